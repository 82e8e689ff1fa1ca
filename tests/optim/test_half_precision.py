"""Half precision: epsilon survives through the float32 masters, and overflow skips the update."""

import copy

import pytest
import torch

import fairseq_asam.optim.optimizers as plugin
from fairseq_asam.optim.half_precision import master_weights, of_model_parameters
from fairseq_asam.sharpness.moments import adam_diagonals, first_moments
from tests.sharpness.plain_directions import ONE_PASS
from tests.training import configuration, mean_sharpness, trainer_and_batches

# With a million weights, |epsilon_i| is typically rho / 1000 of |w_i|: below half a unit in the last place
# of float16 (5e-4 of |w_i|, 2.5e-4 on average) and far below that of bfloat16 (4e-3).
SIZES = ["--encoder-embed-dim=128", "--decoder-embed-dim=128", "--encoder-ffn-embed-dim=512"]
SIZES += ["--decoder-ffn-embed-dim=512", "--encoder-layers=2", "--decoder-layers=2"]
FLAGS = ["--optimizer", "asam", *SIZES, "--lr", "5e-4", "--lr-scheduler", "fixed", "--fp16-init-scale", "4"]


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    """fairseq's half precision expects a GPU where it names the device of its buffers, and on overflow."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


def setting(corpus, *flags, bf16=False, weights=None):
    cfg = configuration(corpus / "bin", *FLAGS, *flags)
    cfg.common.bf16 = bf16  # on the command line it would ask for a TPU here
    trainer, batches = trainer_and_batches(cfg, torch.float32, weights)
    return trainer, batches


@pytest.fixture(scope="module")
def trained(corpus):
    """Weights after 40 updates in float32, and the mean sharpness over the next 40."""
    trainer, batches = setting(corpus)
    mean_sharpness(trainer, batches)
    weights = copy.deepcopy(trainer.model.state_dict())
    return weights, mean_sharpness(*setting(corpus, weights=weights))


@pytest.mark.slow
def test_bfloat16_sees_the_sharpness_of_float32(trained, corpus, monkeypatch, capsys):
    weights, expected = trained
    ours = mean_sharpness(*setting(corpus, bf16=True, weights=weights))
    monkeypatch.setattr(plugin, "master_weights", lambda optimizer: {})
    with pytest.warns(UserWarning, match="half-precision weights absorb most of epsilon"):
        naive = mean_sharpness(*setting(corpus, bf16=True, weights=weights))
    with capsys.disabled():
        print(f"\nmean sharpness: float32 {expected:.4f}, --bf16 {ours:.4f}, added to bfloat16 {naive:.4f}")
    assert ours == pytest.approx(expected, rel=0.1)
    assert naive != pytest.approx(expected, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--fp16"], ["--fp16", "--fp16-no-flatten-grads"]])
def test_float16_sees_the_sharpness_of_float32(trained, corpus, monkeypatch, capsys, flags):
    weights, expected = trained
    ours = mean_sharpness(*setting(corpus, *flags, weights=weights))
    monkeypatch.setattr(plugin, "master_weights", lambda optimizer: {})
    with pytest.warns(UserWarning, match="half-precision weights absorb most of epsilon"):
        naive = mean_sharpness(*setting(corpus, *flags, weights=weights))
    with capsys.disabled():
        print(f"\nmean sharpness: float32 {expected:.4f}, {flags} {ours:.4f}, added to float16 {naive:.4f}")
    assert ours == pytest.approx(expected, rel=0.02)
    assert abs(naive - expected) > 2 * abs(ours - expected)


@pytest.mark.parametrize("flags", [["--fp16"], ["--fp16", "--fp16-no-flatten-grads"]])
@pytest.mark.parametrize("overflowing_pass", [1, 2])
def test_overflow_in_either_pass_skips_the_update(corpus, flags, overflowing_pass):
    trainer, batches = setting(corpus, *flags, "--fresh-masks", "--fp16-init-scale", "64")
    trainer.train_step([batches[0]])
    before = copy.deepcopy(trainer.model.state_dict())
    masters = [p.detach().clone() for p in trainer.optimizer.fp32_optimizer.params]
    criterion, calls = trainer.get_criterion(), []
    forward = criterion.forward

    def overflowing(model, sample):
        calls.append(None)
        loss, sample_size, logging_output = forward(model, sample)
        return loss * (float("inf") if len(calls) == overflowing_pass else 1.0), sample_size, logging_output

    criterion.forward = overflowing
    assert trainer.train_step([batches[1]]) is None
    assert trainer.get_num_updates() == 1
    assert trainer.optimizer.scaler.loss_scale == 32.0
    assert all(torch.equal(w, before[name]) for name, w in trainer.model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(masters, trainer.optimizer.fp32_optimizer.params))
    assert trainer.train_step([batches[2]]) is not None and trainer.get_num_updates() == 2


@pytest.mark.parametrize("flags", [["--fp16"], ["--fp16", "--fp16-no-flatten-grads"]])
@pytest.mark.parametrize("scope", ["update", "micro-batch"])
def test_float16_reuses_the_component_of_float32(corpus, flags, scope):
    """Two updates, the first with both passes. With SGD, whose step is linear in the gradient."""
    interval = ["--optimizer", "asam_sgd", "--lr", "1", "--rho", "1", "--ascent-scope", scope]
    interval += ["--ascent-interval", "2", "--ascent-reuse", "0.7"]
    trainer, batches = setting(corpus, *flags, *interval)
    exact, _ = setting(corpus, *interval)
    without, _ = setting(corpus, *interval, "--ascent-reuse", "0")
    steps = []
    for other in (trainer, exact, without):
        other.train_step([batches[0]])
        before = [w.detach().clone() for w in other.model.parameters()]
        other.train_step([batches[1]])
        moved = zip(other.model.parameters(), before)
        steps.append(torch.cat([(after.detach() - w).double().flatten() for after, w in moved]))
    ours, expected, plain = steps
    assert torch.cosine_similarity(ours, expected, 0) > 0.99
    assert torch.cosine_similarity(plain, expected, 0) < 0.95


@pytest.mark.parametrize("flags", [[], ["--fp16"], ["--fp16", "--fp16-no-flatten-grads"], ["--amp"]])
@pytest.mark.parametrize(
    "direction, normalization",
    [("momentum", "element-wise"), ("momentum", "adam"), ("random", "element-wise")],
)
def test_half_precision_weights_move_from_their_masters(corpus, flags, direction, normalization):
    """By epsilon = rho T^2 g / ||T g|| of float32 vectors, rounded once."""
    rho = 5 if normalization == "element-wise" else 0.5
    epsilon = ["--ascent-direction", direction, "--rho", str(rho), "--normalization", normalization]
    trainer, batches = setting(corpus, *flags, *epsilon)
    for i in range(2):
        trainer.train_step([batches[i]])
    perturbation = trainer.optimizer.fp32_optimizer if flags else trainer.optimizer
    perturbation = perturbation.two_passes(trainer).perturbation
    masters = master_weights(trainer.optimizer)
    moments = of_model_parameters(first_moments, trainer.optimizer)
    names = {w: name for name, w in trainer.model.named_parameters()}
    assert moments.keys() <= names.keys() and len(moments) > 40
    w = {p: masters.get(p, p).detach().double() for p in names}
    T = {p: torch.ones_like(w[p]) if "bias" in names[p] else w[p].abs() + 0.01 for p in names}
    if normalization == "adam":
        T = {p: T.double() for p, T in of_model_parameters(adam_diagonals, trainer.optimizer).items()}
    given = {"seed": trainer.cfg.common.seed, "number": trainer.get_num_updates()}
    g = ONE_PASS[direction](moments=moments, weights=w, **given)
    g = {p: vector.double() for p, vector in g.items()}
    norm = sum((T[p] * g[p]).square().sum() for p in g).sqrt()
    with perturbation:
        for p in g:
            expected = w[p] + rho * T[p] ** 2 * g[p] / norm
            # half a unit in the last place, and the smallest numbers that float16 has
            torch.testing.assert_close(p.detach().double(), expected, rtol=6e-4 if flags else 1e-6, atol=1e-6)


@pytest.mark.parametrize("interval", ["1", "2"])
def test_amp_makes_the_same_step(corpus, interval):
    """Without a GPU autocast does nothing, so that --amp is float32 through fairseq's AMP optimizer."""
    trainer, batches = setting(corpus, "--amp", "--ascent-interval", interval)
    plain, _ = setting(corpus, "--ascent-interval", interval)
    for i in range(3):
        trainer.train_step([batches[i]])
        plain.train_step([batches[i]])
    for (name, w), (_, other) in zip(trainer.model.named_parameters(), plain.model.named_parameters()):
        assert torch.equal(w, other), name
