"""An optimizer steps once per update, after both passes of every micro-batch."""

import pytest
import torch
from fairseq.optim.adafactor import Adafactor
from fairseq.optim.adam import Adam
from fairseq.optim.adamax import Adamax
from fairseq.optim.nag import NAG

from fairseq_asam import SharpnessAware
from tests.tasks.test_train_step import float64_throughout, setting

LSTM = ["--arch", "lstm", "--decoder-out-embed-dim", "32"]
LSTM += [f"--{end}-{size}" for end in ("encoder", "decoder") for size in ("embed-dim=32", "hidden-size=32")]

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


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--optimizer", "asam_sgd", "--ascent-direction", "momentum"], "SGD"),
        (["--optimizer", "asam_nag", "--normalization", "adam"], "NAG"),
        (
            ["--optimizer", "asam", "--perturbed-weights", "normalization-layers", *LSTM],
            "--perturbed-weights is normalization-layers, but the model trains no such weights: choose all "
            "or all-but-embeddings",
        ),
    ],
)
def test_what_epsilon_cannot_be_made_of_is_a_sentence_before_the_first_pass(corpus, flags, sentence):
    trainer, batches = setting(corpus, *flags)
    trainer.criterion.forward = None
    with pytest.raises(SystemExit, match=f"^fairseq_asam: .*{sentence}"):
        trainer.train_step(batches[:1])


@pytest.mark.parametrize(
    "base, options",
    [(Adam, {}), (Adamax, {}), (NAG, {"momentum": 0.9}), (Adafactor, {"beta1": 0.9})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_momentum_points_where_the_optimizer_goes(base, options):
    """On a loss that is linear, and rises alike in all weights, each optimizer goes straight down."""
    w = torch.nn.Parameter(torch.ones(4))
    made = base([w], lr=0.1, **({"relative_step": False} if base is Adafactor else {}), **options)
    optimizer = SharpnessAware(made, [("w", w)], rho=0.5, normalization="none", direction="momentum")
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        loss = w.sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        stepped = w.detach().clone()
        assert stepped.max() < seen[0].min()
    optimizer.step(closure)
    torch.testing.assert_close(seen[2], stepped - 0.25)
