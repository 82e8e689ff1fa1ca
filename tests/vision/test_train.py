"""``python -m fairseq_asam.vision train``: results, resuming, several processes, bf16, bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  slow to import: once, here

from fairseq_asam.vision import data
from fairseq_asam.vision.batches import seed_of
from fairseq_asam.vision.options import TrainOptions
from fairseq_asam.vision.train import train
from tests.algorithm1 import algorithm_1
from tests.processes import started

from . import tiny

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(tiny.__file__))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
DIGITS = ["--dataset", "digits", "--workers", "0"]


@pytest.fixture(autouse=True)
def accelerator_of_its_own():
    """accelerate allows one precision in a process."""
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


def command(output, *flags, model="tiny", optimizer="asam", epochs=3):
    run = ["--model", model, "--optimizer", optimizer, "--output", output, "--epochs", epochs]
    return [str(argument) for argument in ("train", *DIGITS, *run, *flags)]


def result_of(output):
    return json.loads((output / "result.json").read_text())


def made(output, *flags, **options):
    """Make a run in this process and return its result, as the file has it."""
    tiny.main(command(output, *flags, **options))
    return result_of(output)


def without_times(result):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in result["epochs"]]


def checkpoint(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)


def assert_same_state(a, b):
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    states = a["optimizer"]["state"], b["optimizer"]["state"]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 0
    for number, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][number]["momentum_buffer"])


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "asam"])
def test_learns_digits(optimizer, tmp_path):
    result = made(tmp_path / "run", optimizer=optimizer, epochs=5)
    assert result["test_accuracy"] > 0.75 and not result["diverged"]
    epochs = result["epochs"]
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4, 5]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    if optimizer == "sgd":
        assert all(record["sharpness"] == 0 for record in epochs)
    else:
        assert all(record["sharpness"] > 0 for record in epochs)
    assert result["test_accuracy"] == epochs[-1]["test_accuracy"]
    assert result["max_test_accuracy"] == max(record["test_accuracy"] for record in epochs)
    assert result["generalization_gap"] == result["test_loss"] - result["train_loss"]
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_losses_at_the_end_are_plain_cross_entropy_in_evaluation_mode(tmp_path):
    """Computed anew from the checkpoint."""
    result = made(tmp_path / "run", "--label-noise", "0.2", epochs=4)
    model = tiny.noisy(10)
    model.load_state_dict(checkpoint(tmp_path / "run")["model"])
    model.eval()
    parts = data.load("digits", augmentation="none", label_noise=0.2)
    for part, name in ((parts.train, "train"), (parts.test, "test")):
        images, targets = zip(*part)
        probabilities = model(torch.stack(images)).softmax(1)[torch.arange(len(part)), torch.tensor(targets)]
        assert result[f"{name}_loss"] == pytest.approx(-probabilities.log().mean().item(), rel=1e-5)


OF_EPSILON = [
    "--rho",
    "0.3",
    "--eta",
    "0.2",
    "--p-norm",
    "inf",
    "--normalization",
    "layer-wise",
    "--normalize-bias",
]


@pytest.mark.parametrize(
    ("optimizer", "flags", "of_sgd", "smoothing", "settings"),
    [
        ("sgd", [], {}, 0.1, {"rho": 0.0}),
        ("sam", [], {}, 0.1, {"rho": 0.05, "normalization": "none"}),
        ("asam", [], {}, 0.1, {"rho": 0.5}),
        (
            "asam",
            OF_EPSILON,
            {},
            0.1,
            {"rho": 0.3, "eta": 0.2, "p": math.inf, "normalization": "layer-wise", "normalize_bias": True},
        ),
        (
            "asam",
            ["--lr", "0.05", "--momentum", "0.5", "--weight-decay", "0.01", "--label-smoothing", "0"],
            {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01},
            0.0,
            {"rho": 0.5},
        ),
        ("asam", ["--ascent-direction", "momentum"], {}, 0.1, {"rho": 0.5, "direction": "momentum"}),
        (
            "asam",
            ["--ascent-direction", "random", "--seed", "4"],
            {},
            0.1,
            {"rho": 0.5, "direction": "random", "seed": 4},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) if isinstance(value, list) else "",
)
def test_the_options_reach_the_training(optimizer, flags, of_sgd, smoothing, settings, tmp_path):
    """Three updates, each of all images, beside Algorithm 1 in a plain loop."""
    images, targets = zip(*data.load("digits", augmentation="none").train)
    batch = torch.stack(images), torch.tensor(targets)
    whole = ["--batch-size", len(targets), "--augmentation", "none"]
    result = made(tmp_path / "run", *whole, *flags, model="tiny_float64", optimizer=optimizer, epochs=3)

    torch.manual_seed(seed_of(settings.get("seed", 0)))
    plain = tiny.TinyInFloat64(10)
    sgd = torch.optim.SGD(plain.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, **of_sgd})
    losses = algorithm_1(
        plain,
        sgd,
        [[batch]] * 3,
        lambda model, batch, _: F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing),
        factor=lambda number: (1 + math.cos(math.pi * number / 3)) / 2,
        **settings,
    )
    for record, values in zip(result["epochs"], losses):
        assert record["train_loss"] == pytest.approx(values[0], rel=1e-9)
        if optimizer != "sgd":
            sharpness = values[1] - values[0] if len(values) == 2 else None
            assert record["sharpness"] == (sharpness and pytest.approx(sharpness, rel=1e-6))
    for name, w in checkpoint(tmp_path / "run")["model"].items():
        torch.testing.assert_close(w, plain.state_dict()[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("statistics", "counted"), [("first", 1), ("both", 2)])
def test_the_passes_that_update_the_statistics_of_batch_normalization(statistics, counted, tmp_path):
    flags = ["--batch-size", "1000", "--batch-norm-statistics", statistics]
    made(tmp_path / "run", *flags, epochs=2)
    weights = checkpoint(tmp_path / "run")["model"]
    assert [w.item() for name, w in weights.items() if "num_batches" in name] == [2 * counted]


def test_learning_rate_falls_along_a_cosine(tmp_path):
    made(tmp_path / "run", "--lr", "0.2", epochs=4)
    (group,) = checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 3 / 4)))


@pytest.mark.parametrize(
    "epsilon",
    [["--m", "32"], pytest.param(["--ascent-direction", "random"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_killed_and_resumed_is_never_stopped(epsilon, tmp_path):
    """With everything random switched on, a late start, and kill -9 in the middle of an epoch."""
    flags = ["--cutmix", "--label-noise", "0.2", "--batch-size", "64", "--ascent-from", "0.7", *epsilon]
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    expected = made(uninterrupted, *flags, epochs=8)
    run = [sys.executable, SCRIPT, *command(killed, *flags, epochs=8)]
    process = subprocess.Popen(run, env=ENVIRONMENT)
    while not (killed / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 1 <= len(checkpoint(killed)["epochs"]) < 8 and not (killed / "result.json").exists()

    resumed = made(killed, *flags, epochs=8)
    assert without_times(resumed) == without_times(expected)
    assert_same_state(checkpoint(killed), checkpoint(uninterrupted))
    keys = ("train_loss", "test_loss", "test_accuracy", "max_test_accuracy")
    assert all(resumed[key] == expected[key] for key in keys)


def test_before_a_late_start_updates_are_those_of_sgd(tmp_path):
    late = without_times(made(tmp_path / "late", "--ascent-from", "0.5", epochs=4))
    sgd = without_times(made(tmp_path / "sgd", optimizer="sgd", epochs=4))
    sharpness = [record.pop("sharpness") for record in late]
    assert sharpness[:2] == [None, None] and min(sharpness[2:]) > 0
    assert [record.pop("sharpness") for record in sgd] == [0, 0, 0, 0]
    assert late[:2] == sgd[:2] and late[2:] != sgd[2:]


def test_a_finished_run_is_left_alone(tmp_path, capsys):
    result = made(tmp_path / "run", "--p-norm", "inf", epochs=1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert made(tmp_path / "run", "--p-norm", "inf", epochs=1) == result
    assert "is finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_run_that_diverges_ends_with_a_result(tmp_path):
    result = made(tmp_path / "run", "--lr", "1e30")
    assert result["diverged"] and result["epochs"][-1]["train_loss"] is None
    assert len(result["epochs"]) < 3 and result["test_loss"] is None
    assert made(tmp_path / "run", "--lr", "1e30") == result


def test_in_bf16_the_weights_stay_in_float32(tmp_path):
    result = made(tmp_path / "bf16", "--mixed-precision", "bf16", epochs=5)
    assert all(
        w.dtype == torch.float32 for n, w in checkpoint(tmp_path / "bf16")["model"].items() if "weight" in n
    )
    assert result["test_accuracy"] > 0.75 and all(record["sharpness"] > 0 for record in result["epochs"])
    AcceleratorState._reset_state()
    exact = made(tmp_path / "float32", epochs=1)["epochs"][0]
    assert result["epochs"][0]["test_loss"] != exact["test_loss"]


@pytest.mark.parametrize(
    "m",
    [
        pytest.param(0, id="one epsilon"),
        pytest.param(64, id="an epsilon per process", marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_weights_of_one(m, tmp_path):
    """Epsilon from the gradient over both processes is that of one process with the whole batch; epsilon from
    each process's own is m-sharpness with m = half the batch."""
    flags = ["--m-sharpness", m, "--batch-size", "128"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = command(tmp_path / "two", *flags, model="tiny_float64", epochs=2)
    subprocess.run([*launcher, SCRIPT, *run], check=True, env=ENVIRONMENT)
    two = result_of(tmp_path / "two")
    one = made(tmp_path / "one", *flags, model="tiny_float64", epochs=2)
    weights = [checkpoint(tmp_path / name)["model"] for name in ("two", "one")]
    for name, w in weights[0].items():
        torch.testing.assert_close(w, weights[1][name], rtol=1e-10, atol=1e-12)
    for a, b in zip(without_times(two), without_times(one)):
        assert a == pytest.approx(b, rel=1e-6)
    other = made(tmp_path / "other", *flags, "--m-sharpness", 64 - m, model="tiny_float64", epochs=2)
    assert abs(other["train_loss"] - one["train_loss"]) > 1e-5
    assert two["hardware"].startswith("2 x")


def train_on_a_disk_of_its_own(rank, count, port, folder):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    output = folder / str(rank)
    try:
        train(
            TrainOptions(dataset="digits", model="tiny", optimizer="sgd", workers=0, epochs=1, output=output)
        )
    except ValueError as error:
        return str(error)
    return "trained"


def test_processes_that_find_different_runs_are_refused(tmp_path):
    """One of them has finished, and the other has not begun."""
    train(
        TrainOptions(
            dataset="digits", model="tiny", optimizer="sgd", workers=0, epochs=1, output=tmp_path / "0"
        )
    )
    said = started(2, train_on_a_disk_of_its_own, tmp_path)
    assert all(each.startswith("the processes find different runs in ") for each in said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dataset", "mnist"], "digits"),
        (["--model", "resnet21"], "resnet20"),
        (["--optimizer", "adam"], "asam"),
        (["--m", "48"], "m is 48, which does not divide the 32 images"),
        (["--m", "-2"], "m is -2"),
        (["--rho", "-0.1"], "rho is -0.1"),
        (["--optimizer", "sgd", "--rho", "0.1"], "sgd has no epsilon"),
        (["--optimizer", "sam", "--normalization", "filter-wise"], "sam has no normalization operator"),
        (["--batch-size", "100000"], "choose a smaller one"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--label-smoothing", "1"], "label_smoothing is 1.0"),
        (["--lr", "-1"], "learning rate"),
        (["--output", __file__], "is no folder"),
        (["--mixed-precision", "fp16"], "needs a GPU"),
        (["--dataset", "cifar10", "--data", "nowhere"], "nowhere"),
        (["--dataset", "cifar10"], "--data"),
        (["--label-noise", "1.5"], "label_noise is 1.5"),
        (["--ascent-from", "-1"], "ascent_from is -1.0"),
        (["--ascent-from", "100000"], "training ends after"),
        (["--optimizer", "sgd", "--ascent-from", "0.5"], "sgd has no epsilon"),
        (["--optimizer", "sgd", "--ascent-direction", "momentum"], "sgd has no epsilon"),
        (["--ascent-direction", "up"], "'up' (choose from"),
        (["--ascent-direction", "random", "--m", "8"], "m is 8, but ascent_direction random makes one"),
        (
            ["--ascent-direction", "momentum", "--momentum", "0"],
            "momentum is 0.0, but ascent_direction momentum",
        ),
    ],
)
def test_bad_input_gets_one_sentence(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        tiny.main(command(tmp_path / "run", *flags))
    assert exit.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and said in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed", "Megatron-LM"])
def test_what_shares_out_a_model_is_refused(name, monkeypatch, tmp_path, capsys):
    """As accelerate launch asks for it."""
    variable = f"ACCELERATE_USE_{name.upper().replace('-', '_')}"
    monkeypatch.setenv(variable, "true")
    with pytest.raises(SystemExit) as exit:
        tiny.main(command(tmp_path / "run"))
    assert exit.value.code == 2
    said = f"error: accelerate is to use {name} ({variable} is true), but"
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(variable, "false")
    made(tmp_path / "run", epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
def test_accelerate_launch_with_fsdp_is_refused(version, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", version]
    run = [*launcher, "--num_processes", "2", SCRIPT, *command(tmp_path / "run")]
    process = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT)
    assert process.returncode != 0
    assert process.stderr.count("error: accelerate is to use FSDP (ACCELERATE_USE_FSDP is true), but") == 2
    assert not (tmp_path / "run").exists()


def test_another_run_s_folder_is_refused(tmp_path, capsys):
    made(tmp_path / "run", epochs=1)
    for finished in (True, False):
        with pytest.raises(ValueError, match="model tiny, not tiny_float64; epochs 1, not 2"):
            train(TrainOptions("digits", "tiny_float64", "asam", tmp_path / "run", epochs=2))
        if finished:
            (tmp_path / "run" / "result.json").unlink()


def test_a_checkpoint_with_other_classes_or_none_is_refused(tmp_path):
    made(tmp_path / "run", epochs=1)
    (tmp_path / "run" / "result.json").unlink()
    file = tmp_path / "run" / "checkpoint.pt"
    torch.save({**torch.load(file), "num_classes": 7}, file)
    options = TrainOptions("digits", "tiny", "asam", tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="7 classes, but digits has 10"):
        train(options)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        train(options)
