"""What needs a GPU; run by recipes/benchmark/gpu_check.sh."""

import copy
import functools
import math

import pytest
import torch
from fairseq_cli.train import cli_main
from torch import nn

import fairseq_asam.optim.optimizers as plugin
from fairseq_asam import NORMALIZATIONS, Perturbation
from fairseq_asam.optim.half_precision import master_weights
from fairseq_asam.sharpness.directions import Momentum
from fairseq_asam.sharpness.moments import adam_diagonals
from tests.commands import checkpoint, recipe
from tests.training import configuration, mean_sharpness, trainer_and_batches

pytestmark = pytest.mark.gpu

# About 40 million weights, as many as transformer_iwslt_de_en has: |epsilon_i| is some 3e-5 of |w_i|.
LARGE = [f"--{part}-{size}" for part in ("encoder", "decoder") for size in ("layers=6", "embed-dim=512")]
LARGE += [f"--{part}-{size}" for part in ("encoder", "decoder") for size in ("ffn-embed-dim=1024",)]
FLAGS = ["--optimizer", "asam", *LARGE, "--lr", "5e-4", "--lr-scheduler", "fixed", "--fp16-init-scale", "4"]


def model_with_gradients(device, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(24, 300), nn.Linear(300, 3)).double()
    model(torch.randn(6, 2, 8).double()).pow(2).mean().backward()
    gradients = [w.grad for w in model.parameters()]
    model = model.to(device, dtype)
    for w, gradient in zip(model.parameters(), gradients):
        w.grad = gradient.to(device, dtype)
    return model


def assert_epsilon_is_that_of_the_cpu_and_needs_no_synchronization(perturbation_of):
    """*perturbation_of* makes the Perturbation of a model that has gradients."""
    epsilons = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = model_with_gradients(device, dtype)
        perturbation = perturbation_of(model)
        before = copy.deepcopy(model.state_dict())
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            with perturbation:
                moved = [w.detach().clone() for w in model.parameters()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
        epsilons[device] = [(m - w).double().cpu() for m, w in zip(moved, before.values())]
    assert any(epsilon.any() for epsilon in epsilons["cpu"])
    for on_gpu, on_cpu in zip(epsilons["cuda"], epsilons["cpu"]):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("p", [2.0, 1.5, math.inf])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_epsilon_is_that_of_the_cpu_and_needs_no_synchronization(normalization, p):
    assert_epsilon_is_that_of_the_cpu_and_needs_no_synchronization(
        lambda model: Perturbation(model.named_parameters(), 5.0, p=p, normalization=normalization)
    )


@pytest.mark.parametrize("source", ["moments", "diagonals"])
def test_epsilon_from_what_adam_keeps_is_that_of_the_cpu_and_needs_no_synchronization(source):
    def perturbation_of(model):
        adam = torch.optim.Adam(model.parameters(), lr=0.0)
        adam.step()
        options = {"direction": Momentum(adam)}
        if source == "diagonals":
            options = {"diagonals": functools.partial(adam_diagonals, adam)}
        return Perturbation(model.named_parameters(), 5.0, **options)

    assert_epsilon_is_that_of_the_cpu_and_needs_no_synchronization(perturbation_of)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_perturbs_nothing(bad):
    for p in (2.0, 1.5, math.inf):
        model = model_with_gradients("cuda", torch.float32)
        before = copy.deepcopy(model.state_dict())
        model[0].weight.grad[0, 0, 0] = bad
        perturbation = Perturbation(model.named_parameters(), 0.5, p=p)
        with perturbation:
            assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
        assert not torch.isfinite(perturbation.norm)


def setting(corpus, *flags, weights=None):
    cfg = configuration(corpus / "bin", *FLAGS, *flags)
    cfg.common.cpu = False
    if "--bf16" in flags:
        cfg.common.tpu = False
    return trainer_and_batches(cfg, torch.float32, weights)


def sharpness_at(weights, corpus, *flags):
    """The mean sharpness of some batches at *weights*, which a learning rate of 0 leaves as they are."""
    trainer, batches = setting(corpus, *flags, "--lr", "0", weights=weights)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    with torch.no_grad():
        for parameter, master in master_weights(trainer.optimizer).items():
            master.copy_(weights[names[parameter]])  # it was made of the rounded weight
    return mean_sharpness(trainer, batches)


@pytest.fixture(scope="module")
def trained(corpus):
    """Weights after 40 updates in float32, and their sharpness."""
    trainer, batches = setting(corpus)
    mean_sharpness(trainer, batches)
    weights = {name: w.cpu() for name, w in trainer.model.state_dict().items()}
    return weights, sharpness_at(weights, corpus)


@pytest.mark.parametrize(
    "flags", [["--fp16"], ["--fp16", "--fp16-no-flatten-grads"], ["--bf16"], ["--amp"]], ids=" ".join
)
def test_half_precision_sees_the_sharpness_of_float32(trained, corpus, monkeypatch, capsys, flags):
    weights, expected = trained
    ours = sharpness_at(weights, corpus, *flags)
    monkeypatch.setattr(plugin, "master_weights", lambda optimizer: {})
    naive = sharpness_at(weights, corpus, *flags)
    with capsys.disabled():
        print(f"\nmean sharpness: float32 {expected:.4f}, {' '.join(flags)} {ours:.4f}, naive {naive:.4f}")
    assert ours == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "form", [["--ascent-direction", "momentum"], ["--normalization", "adam", "--rho", "0.01"]], ids=" ".join
)
def test_half_precision_learns_as_float32_does_from_what_adam_keeps(trained, corpus, form):
    weights, _ = trained

    def losses(*flags):
        trainer, batches = setting(corpus, *form, *flags, weights=weights)
        return [float(trainer.train_step([batches[i % len(batches)]])["loss"]) for i in range(20)]

    expected = losses()
    assert losses("--fp16") == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "flags", [["--fp16"], ["--fp16", "--fp16-no-flatten-grads"], ["--amp"]], ids=" ".join
)
def test_overflow_skips_the_update_and_lowers_the_scale(corpus, flags):
    trainer, batches = setting(corpus, *flags, "--fp16-init-scale", str(2**30))
    before = {name: w.clone() for name, w in trainer.model.named_parameters()}
    trainer.train_step([batches[0]])
    scaler = trainer.optimizer.scaler
    assert (scaler.get_scale() if "--amp" in flags else scaler.loss_scale) < 2**30
    if trainer.get_num_updates() == 0:
        assert all(torch.equal(w, before[name]) for name, w in trainer.model.named_parameters())
    for i in range(40):
        trainer.train_step([batches[i % len(batches)]])
    assert trainer.get_num_updates() > 0
    assert all(torch.isfinite(w).all() for w in trainer.model.parameters())


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
def test_rho_zero_is_adam(corpus, tmp_path, monkeypatch, scope):
    """Up to rounding: torch has no deterministic form of some operations."""
    saved = {}
    for name, flags in (("adam", []), ("asam", ["--rho", "0", "--ascent-scope", scope])):
        arguments = recipe(corpus / "bin", tmp_path / name, "--optimizer", name, *flags)
        arguments = [str(a) for a in arguments if a != "--cpu"] + ["--max-update", "20", "--update-freq", "2"]
        monkeypatch.setattr("sys.argv", ["fairseq-train", *arguments, "--dropout", "0.2"])
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            cli_main()
        finally:
            torch.use_deterministic_algorithms(False)
        saved[name] = checkpoint(tmp_path / name)["model"]
    for name, w in saved["adam"].items():
        torch.testing.assert_close(saved["asam"][name], w, rtol=1e-3, atol=1e-4)
