"""An optimizer steps once per update, after both passes of every micro-batch."""

import pytest

from tests.tasks.test_train_step import float64_throughout, setting

__all__ = ["float64_throughout"]  # a fixture that applies here too


def test_a_step_without_the_pass_at_w_plus_epsilon_is_an_error(corpus):
    trainer, batches = setting(corpus, "--optimizer", "asam")
    trainer.train_step(batches[:1])
    trainer.zero_grad()
    trainer.criterion(trainer.model, batches[0])[0].backward()
    with pytest.raises(RuntimeError, match="--optimizer asam would step without a pass at w"):
        trainer.optimizer.step()


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
def test_a_step_before_the_last_micro_batch_is_an_error(corpus, scope):
    trainer, batches = setting(corpus, "--optimizer", "asam", "--ascent-scope", scope)
    arguments = trainer.model, trainer.criterion, trainer.optimizer
    trainer.optimizer.begin_update(trainer, num_micro_batches=2)
    trainer.task.train_step(batches[0], *arguments, update_num=0)
    with pytest.raises(RuntimeError, match="--optimizer asam would step without a pass at w"):
        trainer.optimizer.step()
    trainer.task.train_step(batches[1], *arguments, update_num=0)
    trainer.optimizer.step()
