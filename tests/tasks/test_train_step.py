"""The step that fairseq's Trainer makes, against Algorithm 1 written out by hand."""

import copy
import math

import pytest
import torch
from fairseq import utils
from training import FLOAT64_THROUGHOUT, configuration, trainer_and_batches

RHO, ETA = 0.2, 0.01


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    for name, replacement in FLOAT64_THROUGHOUT.items():
        monkeypatch.setattr(utils, name, replacement)


def setting(corpus, *flags):
    return trainer_and_batches(configuration(corpus / "bin", *flags))


def gradient(trainer, batches):
    """The summed gradient of *batches* at the present weights, by name."""
    trainer.model.zero_grad()
    for batch in batches:
        trainer.criterion(trainer.model, batch)[0].backward()
    return {name: w.grad.clone() for name, w in used_parameters(trainer)}


def used_parameters(trainer):
    """Names and parameters that the loss depends on; fairseq 0.12.2 has others."""
    return [(name, w) for name, w in trainer.model.named_parameters() if w.grad is not None]


def by_hand(trainer, batches, scope, normalization):
    """The gradient at w + epsilon of *batches*, with plain loops over the parameters."""
    if scope == "micro-batch":
        parts = [by_hand(trainer, [batch], "update", normalization) for batch in batches]
        return {name: sum(part[name] for part in parts) for name in parts[0]}
    at_w = gradient(trainer, batches)
    weights = {name: w.detach().clone() for name, w in used_parameters(trainer)}
    scale = {
        name: torch.ones_like(w) if normalization == "none" or name.endswith("bias") else w.abs() + ETA
        for name, w in weights.items()
    }
    norm = sum((scale[name] * at_w[name]).square().sum() for name in weights).sqrt()
    with torch.no_grad():
        for name, w in used_parameters(trainer):
            w += RHO * scale[name] ** 2 * at_w[name] / norm
    at_w_plus_epsilon = gradient(trainer, batches)
    with torch.no_grad():
        for name, w in used_parameters(trainer):
            w.copy_(weights[name])
    return at_w_plus_epsilon


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
@pytest.mark.parametrize("optimizer, normalization", [("asam", "element-wise"), ("sam", "none")])
@pytest.mark.parametrize("clip_norm", ["0", "0.05"])
def test_the_step_is_algorithm_1(corpus, scope, optimizer, normalization, clip_norm):
    """Twenty updates of three micro-batches each; the small clip norm bites."""
    flags = ["--ascent-scope", scope, "--rho", str(RHO), "--clip-norm", clip_norm]
    trainer, batches = setting(corpus, "--optimizer", optimizer, *flags)
    reference, _ = setting(corpus, "--optimizer", "adam", "--clip-norm", clip_norm)
    assert len(batches) > 8
    for update in range(20):
        micro_batches = [batches[(3 * update + i) % len(batches)] for i in range(3)]
        expected = by_hand(reference, micro_batches, scope, normalization)
        tokens = sum(batch["ntokens"] for batch in micro_batches)
        reference.zero_grad()
        for name, w in reference.model.named_parameters():
            w.grad = expected[name] / tokens if name in expected else None
        norm = torch.cat([g.flatten() / tokens for g in expected.values()]).norm()
        if float(clip_norm) > 0:
            assert norm > float(clip_norm)
            for _, w in used_parameters(reference):
                w.grad *= float(clip_norm) / (norm + 1e-6)
        reference.optimizer.step()
        reference.set_num_updates(update + 1)

        trainer.train_step(copy.deepcopy(micro_batches))
        for (name, w), (_, expected_w) in zip(
            trainer.model.named_parameters(), reference.model.named_parameters()
        ):
            torch.testing.assert_close(
                w, expected_w, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert trainer.get_num_updates() == 20


def test_a_step_without_the_pass_at_w_plus_epsilon_is_an_error(corpus):
    trainer, batches = setting(corpus, "--optimizer", "asam")
    trainer.train_step(batches[:1])
    trainer.zero_grad()
    trainer.criterion(trainer.model, batches[0])[0].backward()
    with pytest.raises(RuntimeError, match="--optimizer asam was to step without a pass at w"):
        trainer.optimizer.step()


def test_sharpness_is_the_difference_of_two_losses(corpus):
    """In the unit of fairseq's loss column, weighted by the sample size."""
    trainer, batches = setting(corpus, "--optimizer", "asam")

    def loss():
        with torch.no_grad():
            results = [trainer.criterion(trainer.model, batch) for batch in batches[:2]]
        return (sum(r[0] for r in results) / sum(r[1] for r in results)).item() / math.log(2)

    at_w = loss()
    gradient(trainer, batches[:2])
    with trainer.optimizer.perturbation(trainer.model, trainer.criterion, trainer.optimizer):
        perturbed = loss()
    stats = trainer.train_step(copy.deepcopy(batches[:2]))
    assert stats["loss"] == pytest.approx(at_w, abs=2e-3)  # fairseq rounds its columns
    assert stats["sharpness"] == pytest.approx(perturbed - at_w, abs=1e-4)


def test_a_model_that_steps_a_moving_average_does_so_at_w(corpus):
    """As data2vec does, whenever a task tells it the number of the update."""
    trainer, batches = setting(corpus, "--optimizer", "asam", "--ascent-scope", "micro-batch")
    model, seen = trainer.get_model(), []
    model.set_num_updates = lambda n: seen.append((n, model.encoder.embed_tokens.weight.detach().clone()))
    at_w = []
    for i in range(3):
        at_w.append(model.encoder.embed_tokens.weight.detach().clone())
        trainer.train_step([batches[i]])
    assert all(any(torch.equal(w, seen_w) for w in at_w) for _, seen_w in seen[:-1])
