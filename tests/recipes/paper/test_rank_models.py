"""The grid of models end to end, on digits."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from fairseq_asam.vision.models import build_model
from recipes.paper import rank_models

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = [
    "--batch-size",
    "32",
    "--weight-decay",
    "1e-4",
    "--steps",
    "3",
    "--stop-loss",
    "0.1",
    "--epochs",
    "6",
]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command with an output folder of its own; return what it printed."""

    def run(*arguments):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(sys, "argv", ["rank_models", str(tmp_path / "out"), *QUICK, *arguments])
        rank_models.main()
        return capsys.readouterr().out

    return run


def files_of(tmp_path):
    return sorted((tmp_path / "out" / "models").iterdir())


def without_times(path):
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}


def test_a_grid_from_training_to_table_and_on_after_an_interruption(tmp_path, command):
    out = command("--lr", "0.03", "0.1", "--dropout", "0", "0.2", "--jobs", "2")
    assert "4 of 4 models reached a training loss of 0.1 within 6 epochs" in out
    assert (tmp_path / "out" / "rank.md").read_text("utf-8") == out
    # the paper's Table 1 stands beside
    tau = next(line for line in out.splitlines() if line.startswith("| τ"))
    assert tau.endswith("| 0.174 | 0.636 | 0.257 | 0.616 |") and tau.count("|") == 10
    assert (tmp_path / "out" / "rank.png").read_bytes().startswith(b"\x89PNG")
    models = json.loads((tmp_path / "out" / "models.json").read_text())
    assert len(models) == 4
    for model in models:
        assert model["train_loss"] <= 0.1 < 2 * model["train_loss"]
        assert model["generalization_gap"] == model["test_loss"] - model["train_loss"]
        assert len(model["measures"]) == 4 and all(value > 0 for value in model["measures"].values())
    files = files_of(tmp_path)
    assert len(files) == 4

    # one is lost: it alone is made again, with the same numbers, and with one job at a time
    before = without_times(files[2])
    files[2].unlink()
    others = {path: path.stat().st_mtime_ns for path in files if path != files[2]}
    again = command("--lr", "0.03", "0.1", "--dropout", "0", "0.2", "--jobs", "1")
    assert again.splitlines()[:-1] == out.splitlines()[:-1]  # the last line has the time
    assert files_of(tmp_path) == files and without_times(files[2]) == before
    assert all(path.stat().st_mtime_ns == time for path, time in others.items())


def test_a_model_that_misses_the_criterion_is_counted_and_left_out(tmp_path, command):
    out = command("--lr", "1e-5", "0.05", "0.1", "--dropout", "0")
    assert "2 of 3 models reached a training loss of 0.1" in out
    assert len(json.loads((tmp_path / "out" / "models.json").read_text())) == 2
    failed = json.loads(
        (
            tmp_path / "out" / "models" / "batch_size-32-lr-1e-05-weight_decay-0.0001-dropout-0.json"
        ).read_text()
    )
    assert failed["reached"] is False and failed["epochs"] == 6 and "measures" not in failed
    # a setting that differs would mix two experiments
    with pytest.raises(SystemExit, match=r"was made with epochs 6, not 7: choose another OUT$"):
        command("--lr", "1e-5", "0.05", "0.1", "--dropout", "0", "--epochs", "7")


def test_the_loss_measured_is_that_of_the_training_images_in_evaluation_mode():
    """As fairseq_asam.vision has it, computed here in one piece and in float64."""
    torch.manual_seed(0)
    images, network = rank_models.load("digits", None), build_model("mlp", 10, 0.5)
    loss, accuracy = rank_models.evaluate(network, *images.train)
    terms = list(rank_models.mean_loss(network.eval(), *images.train))
    assert sum(count for _, count in terms) == len(images.train[0]) == 1197
    assert sum(term.item() for term, _ in terms) / 1197 == pytest.approx(loss, rel=1e-5)
    outputs = network.double()(images.train[0].double())
    assert loss == pytest.approx(F.cross_entropy(outputs, images.train[1]).item(), rel=1e-5)
    assert accuracy == (outputs.argmax(1) == images.train[1]).double().mean().item()


def test_the_cube_of_p_infinity_is_the_largest_in_the_ball():
    settings = rank_models.Settings(
        "digits", "mlp", 0.1, 1, 1, 0, rho=0.1, adaptive_rho=0.4, steps=1, images=1
    )
    plain, adaptive, plain_cube, adaptive_cube = settings.regions(weights=400)
    assert (plain.rho, plain.p, plain.normalization) == (0.1, 2.0, "none")
    assert (adaptive.rho, adaptive.p, adaptive.normalization) == (0.4, 2.0, "element-wise")
    for ball, cube in ((plain, plain_cube), (adaptive, adaptive_cube)):
        assert cube.p == math.inf and cube.normalization == ball.normalization
        assert torch.full((400,), cube.rho).norm().item() == pytest.approx(ball.rho)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dropout", "1"], r"--dropout has the value 1.0, but it must be at least 0 and below 1"),
        (["--batch-size", "0"], r"--batch-size has the value 0, but it must be at least 2"),
        (["--batch-size", "5000"], r"--batch-size is 5000, but there are 1197 images"),
        (["--lr", "nan"], r"--lr has the value nan"),
        (["--epochs", "0"], r"--epochs is 0, but it must be at least 1"),
        (["--stop-loss", "0"], r"--stop-loss is 0.0, but it is a loss to reach"),
        (["--rho", "-1"], r"rho is -1"),
        (["--jobs", "0"], r"--jobs is 0, but it must be at least 1"),
        (["--dataset", "cifar10"], r"CIFAR10 needs a folder: name one with --data"),
        (["--dataset", "cifar10", "--data", "nowhere"], r"'nowhere' has no CIFAR10"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(arguments, message, tmp_path, command):
    with pytest.raises(SystemExit, match=message):
        command(*arguments)
    assert not (tmp_path / "out").exists()


def test_too_few_models_to_rank(tmp_path, command):
    with pytest.raises(SystemExit, match="0 of 1 models reached the training loss 1e-09, too few to rank"):
        command("--lr", "0.1", "--dropout", "0", "--epochs", "1", "--stop-loss", "1e-9")
    assert not (tmp_path / "out" / "models.json").exists()


def test_an_unreadable_file_is_named(tmp_path, command):
    file = tmp_path / "out" / "models" / "batch_size-32-lr-0.1-weight_decay-0.0001-dropout-0.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(SystemExit, match=r"0.json' cannot be read: delete it"):
        command("--lr", "0.1", "--dropout", "0")
