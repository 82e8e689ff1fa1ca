"""``--ascent-interval``: the Trainer's updates are those of LookSAM, and an old component is not reused."""

import copy

import pytest
import torch

from tests.tasks.test_train_step import RHO, assert_same_weights, float64_throughout, reference_of, setting

__all__ = ["float64_throughout"]  # a fixture that applies here too


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
@pytest.mark.parametrize("clip_norm", ["0", "0.05"])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_an_ascent_interval_is_looksam(corpus, scope, clip_norm, alpha):
    """Ten updates of two micro-batches, every third with both passes."""
    flags = ["--ascent-scope", scope, "--rho", str(RHO), "--clip-norm", clip_norm, "--ascent-interval", "3"]
    flags += [] if alpha is None else ["--ascent-reuse", str(alpha)]
    trainer, batches = setting(corpus, "--optimizer", "asam", *flags)
    reference = reference_of(
        corpus, "--clip-norm", clip_norm, scope=scope, normalization="element-wise", interval=3, alpha=alpha
    )
    assert len(batches) > 4
    for update in range(10):
        micro_batches = [batches[(2 * update + i) % len(batches)] for i in range(2)]
        reference.update(micro_batches)
        assert reference.norm > float(clip_norm)
        stats = trainer.train_step(copy.deepcopy(micro_batches))
        assert ("sharpness" in stats) == (update % 3 == 0)
        assert_same_weights(trainer, reference)


def test_what_an_earlier_run_found_is_not_reused(corpus):
    """A run may have gone on without an interval in between."""
    trainer, batches = setting(corpus, "--optimizer", "asam", "--ascent-interval", "3")
    made = []
    for update, num_updates in enumerate((0, 1, 2, 3, 7, 8, 10)):
        trainer.set_num_updates(num_updates)
        made.append("sharpness" in trainer.train_step([batches[update]]))
    assert made == [True, False, False, True, True, False, True]


def test_a_pass_at_w_that_runs_out_of_memory_leaves_no_other_gradient_in_the_component(corpus):
    """With an epsilon for each micro-batch, ``.grad`` has that at w + epsilon of the earlier ones by then."""
    flags = ["--ascent-scope", "micro-batch", "--ascent-interval", "2"]
    trainer, batches = setting(corpus, "--optimizer", "asam", *flags)
    arguments = trainer.model, trainer.criterion, trainer.optimizer
    trainer.criterion(trainer.model, batches[0])[0].backward()
    at_w = {w: w.grad for w in trainer.model.parameters() if w.grad is not None}
    g = torch.cat([gradient.flatten() for gradient in at_w.values()])
    trainer.zero_grad()
    trainer.optimizer.begin_update(trainer, num_micro_batches=2)
    trainer.task.train_step(batches[0], *arguments, update_num=0)

    def out_of_memory(*arguments, **options):
        raise RuntimeError("out of memory")

    trainer.criterion.forward = out_of_memory
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.task.train_step(batches[1], *arguments, update_num=0)
    torch.manual_seed(0)
    for w, gradient in at_w.items():
        w.grad = gradient + 0.1 * g.abs().mean() * torch.randn_like(w)
    g_s = torch.cat([w.grad.flatten() for w in at_w])
    trainer.optimizer.clip_grad_norm(0.0)
    trainer.optimizer.update.looksam.store_component()
    state = trainer.optimizer.optimizer.state
    component = torch.cat([state[w]["ascent_component"].flatten() for w in at_w])
    assert torch.cosine_similarity(component, g_s - (g @ g_s) / (g @ g) * g, 0) == pytest.approx(1.0)
