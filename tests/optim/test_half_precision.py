"""Half precision: epsilon survives through the float32 masters, and overflow skips the update."""

import copy

import pytest
import torch

import fairseq_asam.optim.optimizers as plugin
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


def in_the_shapes_of(weights, tensors):
    """*tensors* in float64, one for each of *weights*; with --fp16 there is one flat tensor for all."""
    joined = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    parts = joined.split([w.numel() for w in weights])
    return {w: part.view_as(w) for w, part in zip(weights, parts)}


#: Half a unit in the last place, relative, and a little for float32.
HALF_A_UNIT = {torch.float32: 1e-6, torch.float16: 2**-11 + 1e-4, torch.bfloat16: 2**-8 + 1e-4}


@pytest.mark.parametrize(
    "flags, bf16",
    [
        ([], False),
        (["--fp16"], False),
        (["--fp16", "--fp16-no-flatten-grads"], False),
        ([], True),
        (["--amp"], False),
    ],
)
@pytest.mark.parametrize(
    "direction, normalization",
    [("momentum", "element-wise"), ("momentum", "adam"), ("random", "element-wise")],
)
def test_half_precision_weights_move_from_their_masters(corpus, flags, bf16, direction, normalization):
    """By epsilon = rho T^2 g / ||T g|| of float32 vectors, rounded once."""
    rho = 5 if normalization == "element-wise" else 0.5
    epsilon = ["--ascent-direction", direction, "--rho", str(rho), "--normalization", normalization]
    trainer, batches = setting(corpus, *flags, *epsilon, bf16=bf16)
    for i in range(2):
        trainer.train_step([batches[i]])
    asam = getattr(trainer.optimizer, "fp32_optimizer", trainer.optimizer)
    # fairseq's order: a weight that is used twice comes once.
    names = {w: name for name, w in trainer.model.named_parameters()}
    adam = asam.optimizer

    def kept(name):
        """By Adam, for each weight: 0 for those of which fairseq 0.12.2 makes use in inference alone."""
        states = [(master, adam.state.get(master, {})) for master in asam.params]
        kept = [state.get(name, torch.zeros_like(master)) for master, state in states]
        return in_the_shapes_of(names, kept)

    w, moments, v = in_the_shapes_of(names, asam.params), kept("exp_avg"), kept("exp_avg_sq")
    assert sum(bool(moment.any()) for moment in moments.values()) > 40
    of_run = {"seed": trainer.cfg.common.seed, "number": trainer.get_num_updates()}
    g = ONE_PASS[direction](moments=moments, weights=w, **of_run)
    T = {p: torch.ones_like(w[p]) if "bias" in names[p] else w[p].abs() + 0.01 for p in names}
    if normalization == "adam":
        (group,) = adam.param_groups
        correction = 1 - group["betas"][1] ** 2
        T = {p: ((v[p] / correction).sqrt() + group["eps"]) ** -0.5 for p in names}
    norm = sum((T[p] * g[p]).square().sum() for p in names).sqrt()
    with asam.two_passes(trainer).perturbation:
        for p in names:
            expected = w[p] + rho * T[p] ** 2 * g[p] / norm
            # atol: the smallest numbers that float16 has
            torch.testing.assert_close(
                p.detach().double(), expected, rtol=HALF_A_UNIT[p.dtype], atol=1e-6, msg=names[p]
            )


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
