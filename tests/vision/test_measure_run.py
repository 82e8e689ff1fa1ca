"""``python -m fairseq_asam.vision sharpness``: its figures, its options, bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState

from fairseq_asam import Region, measure
from fairseq_asam.vision import data

from . import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with batch normalization and dropout, and all that changes images or labels."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    of_the_data = ["--label-noise", "0.2", "--hold-out", "200", "--seed", "3"]
    of_the_training = ["--model", "tiny", "--optimizer", "asam", "--epochs", "2", "--cutmix"]
    tiny.main(["train", "--dataset", "digits", "--output", str(folder), *of_the_data, *of_the_training])
    AcceleratorState._reset_state()  # accelerate allows one precision in a process
    PartialState._reset_state()
    return folder


@pytest.fixture
def measured(run, tmp_path, capsys):
    """Run the command with flags; return what it printed and what it wrote."""

    def command(*flags):
        file = tmp_path / "out.json"
        tiny.main(["sharpness", str(run), "--cpu", "--json", str(file), *map(str, flags)])
        return capsys.readouterr().out, json.loads(file.read_text())

    return command


@pytest.mark.parametrize(
    ("split", "images", "said"), [("train", 997, "997 training images"), ("test", 200, "200 held-out images")]
)
def test_the_loss_at_w_is_the_one_in_the_result(run, measured, split, images, said):
    result = json.loads((run / "result.json").read_text())
    out, written = measured("--split", split, "--rho", 0.1)
    assert written["loss"] == pytest.approx(result[f"{split}_loss"], rel=1e-6)
    assert f"loss {result[f'{split}_loss']:.4f} nats per image" in out
    assert written["images"] == images and said in out
    assert written["options"] == result["options"] and written["epoch"] == 2


def test_the_figures_are_those_of_measure(run, measured):
    """Of all images at once, in a network built anew; the command takes four batches."""
    model = tiny.noisy(10)
    model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["model"])
    parts = data.load("digits", augmentation="none", label_noise=0.2, hold_out=200, seed=3)
    images, targets = zip(*parts.test)
    images, targets = torch.stack(images), torch.tensor(targets)
    adaptive = {"normalization": "filter-wise", "eta": 0.1, "normalize_bias": True}
    regions = [
        region
        for p in (2.0, math.inf)
        for rho in (0.02, 0.3)
        for region in (Region(rho, p=p, normalization="none"), Region(rho, p=p, **adaptive))
    ]
    flags = ["--rho", 0.02, 0.3, "--p-norm", 2, "inf", "--normalization", "filter-wise", "--eta", 0.1]
    flags += ["--normalize-bias", "--split", "test", "--batch-size", 60]
    for ascents, steps in (((1, 1, 1), []), ((3, 2, 7), ["--steps", 3, "--restarts", 2, "--seed", 7])):
        expected = measure(lambda: F.cross_entropy(model(images), targets), model, regions, *ascents)
        out, written = measured(*flags, *steps)
        assert written["batches"] == 4
        rows = written["regions"]
        assert [f"{row['p']} {row['rho']}" for row in rows] == ["2 0.02", "2 0.3", "inf 0.02", "inf 0.3"]
        found = [row[key] for row in rows for key in ("sharpness", "adaptive_sharpness")]
        assert found == pytest.approx([each.value for each in expected], rel=1e-3)
        for row in rows:
            cells = (row["p"], f"{row['rho']:g}", *(f"{v:.6f}" for v in list(row.values())[2:4]))
            assert f"| {' | '.join(cells)} |" in out


def test_random_batches_are_the_same_for_the_same_seed(run, measured):
    flags = ["--rho", 0.1, "--batches", 3, "--batch-size", 20, "--seed"]
    (_, first), (_, again), (_, other) = (measured(*flags, seed) for seed in (1, 1, 2))
    assert first["images"] == 60 and first["batches"] == 3
    assert first["regions"] == again["regions"] != other["regions"]
    whole = measured("--rho", 0.1)[1]
    assert measured("--rho", 0.1, "--batches", 50)[1]["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def edited(run, folder, **options):
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    folder.mkdir()
    torch.save({**checkpoint, "options": {**checkpoint["options"], **options}}, folder / "checkpoint.pt")
    return folder


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command, which is to fail, and return the sentence it ends with."""

    def command(*arguments):
        file = tmp_path / "out.json"
        with pytest.raises(SystemExit) as exit:
            tiny.main(["sharpness", "--json", str(file), *map(str, arguments)])
        assert exit.value.code == 2 and not file.exists()
        return capsys.readouterr().err.splitlines()[-1].split("error: ")[1]

    return command


def test_what_cannot_be_measured_is_refused_in_a_sentence(run, tmp_path, refused):
    assert "none' has no checkpoint.pt" in refused(tmp_path / "none")
    assert "test_measure_run.py' is no folder" in refused(__file__)
    cifar = edited(run, tmp_path / "cifar", dataset="cifar10")
    assert "CIFAR10 needs a folder: name one with --data" in refused(cifar)
    assert "nowhere' has no CIFAR10" in refused(cifar, "--data", tmp_path / "nowhere")
    (cifar / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:1000])
    assert "checkpoint.pt cannot be read as a checkpoint" in refused(cifar)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batches", "0"], "batches is 0, but it must be at least 1"),
        (["--batch-size", "0"], "batch_size is 0, but it must be at least 1"),
        (["--workers", "-1"], "workers is -1, but it must be at least 0"),
        (["--rho", "0.1", "-1"], "rho is -1.0"),
        (["--eta", "-1"], "eta is -1.0"),
        (["--p-norm", "1"], "p is 1.0"),
        (["--steps", "0"], "steps is 0"),
        (["--restarts", "2"], "restarts is 2, but one ascent step has one start"),
        (["--p-norm", "3", "--steps", "2"], "p is 3.0, but more than one ascent step needs"),
        (["--json", str(ROOT)], "is a folder: give --json the name of a file"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(flags, said, refused):
    assert said in refused("none", *flags)


def test_neither_command_needs_what_the_other_does():
    program = "import sys"
    for module in ("fairseq_asam.measuring.command_line", "fairseq_asam.vision.__main__"):
        program += f"\nimport {module}"
        program += "\nprint([name for name in ('fairseq', 'torchvision') if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert answer.stdout.splitlines() == ["[]", "['torchvision']"], answer.stderr
