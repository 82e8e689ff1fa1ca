"""The command that averages checkpoints: against numpy, and with fairseq's own training and generation."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

from fairseq_asam import averaging
from tests.commands import PLUGIN, checkpoint, recipe

#: Whether this torch can load fairseq's types and no others.
SAFE = hasattr(torch.serialization, "add_safe_globals")


def save(file: Path, **weights: torch.Tensor) -> Path:
    file.parent.mkdir(exist_ok=True)
    torch.save({"model": weights, "of": file.name}, file)
    return file


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder of checkpoints with one weight, which is the number of the epoch or of the update."""
    folder = tmp_path / "run"
    for epoch in (8, 9, 10, 11):
        save(folder / f"checkpoint{epoch}.pt", w=torch.tensor([float(epoch)]))
    for epoch, updates in ((9, 90), (10, 100), (10, 105)):
        save(folder / f"checkpoint_{epoch}_{updates}.pt", w=torch.tensor([float(updates)]))
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        save(folder / name, w=torch.tensor([-1.0]))
    return folder


@pytest.fixture
def averaged(monkeypatch, capsys, tmp_path):
    """Run the command; return the checkpoint that it wrote."""

    def command(*arguments) -> dict:
        monkeypatch.setattr(sys, "argv", ["averaging", *map(str, arguments)])
        averaging.main()
        return torch.load(arguments[1], weights_only=SAFE)

    return command


@pytest.mark.parametrize(
    ("flags", "mean", "last"),
    [
        (["--last", "3"], 10.0, "checkpoint11.pt"),
        (["--last", "2", "--by", "updates"], 102.5, "checkpoint_10_105.pt"),
        (["--checkpoints", "checkpoint8.pt", "checkpoint_9_90.pt"], 49.0, "checkpoint_9_90.pt"),
    ],
)
def test_checkpoints_are_chosen_by_epoch_by_update_or_by_name(run, averaged, tmp_path, flags, mean, last):
    found = averaged(run, tmp_path / "new" / "mean.pt", *flags)
    assert found["model"]["w"].item() == mean
    assert found["of"] == last


def test_a_run_without_checkpoints_of_epochs_is_averaged_by_updates(run, averaged, tmp_path):
    for file in run.glob("checkpoint?.pt"):
        file.unlink()
    for file in run.glob("checkpoint??.pt"):
        file.unlink()
    assert averaged(run, tmp_path / "mean.pt", "--last", "3")["model"]["w"].item() == pytest.approx(295 / 3)


def test_the_last_five_are_the_default(run, averaged, tmp_path):
    save(run / "checkpoint12.pt", w=torch.tensor([12.0]))
    save(run / "checkpoint2.pt", w=torch.tensor([2.0]))
    assert averaged(run, tmp_path / "mean.pt")["model"]["w"].item() == 10.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_is_numpys_in_float64(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    # Sums of the large ones overflow float16.
    weights = [(30000 * torch.randn(50, 7, generator=generator).sign()).to(dtype) for _ in range(3)]
    weights = [w + torch.randn(50, 7, generator=generator).to(dtype) for w in weights]
    files = [save(tmp_path / f"{i}.pt", w=w) for i, w in enumerate(weights)]
    found = averaging.average(files)["model"]["w"]
    mean = np.mean([w.double().numpy() for w in weights], axis=0)
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(mean).to(dtype))


def test_whole_numbers_are_those_of_the_last_checkpoint(tmp_path):
    counts = [torch.tensor([3, 4]), torch.tensor([10, 20])]
    files = [save(tmp_path / f"{i}.pt", count=c, w=torch.ones(1)) for i, c in enumerate(counts)]
    assert averaging.average(files)["model"]["count"].tolist() == [10, 20]


def test_weights_that_share_memory_still_do_unless_their_means_differ(tmp_path):
    tied, other = torch.full((1000,), 1.0), torch.full((1000,), 3.0)
    both_tied = [save(tmp_path / f"{i}.pt", a=w, b=w) for i, w in enumerate((tied, other))]
    found = averaging.average(both_tied)["model"]
    assert found["a"].data_ptr() == found["b"].data_ptr() and found["a"][0] == 2.0
    apart = save(tmp_path / "apart.pt", a=tied, b=other)
    found = averaging.average([apart, both_tied[1]])["model"]
    assert (found["a"][0], found["b"][0]) == (2.0, 3.0)


def test_fairseq_generate_takes_what_it_writes(corpus, fairseq, averaged, tmp_path):
    kept = ["--save-interval-updates", "10", "--keep-interval-updates", "3", "--max-update", "40"]
    arguments = recipe(corpus / "bin", tmp_path / "run", "--optimizer", "asam", *PLUGIN, *kept)
    training = fairseq("train", *(flag for flag in arguments if flag != "--no-epoch-checkpoints"))
    assert training.status == 0, training.output
    names = sorted(file.name for file in (tmp_path / "run").glob("checkpoint_*_*.pt"))
    assert len(names) == 3
    out = tmp_path / "mean.pt"
    found = averaged(tmp_path / "run", out, "--by", "updates", "--last", "3")
    states = [checkpoint(tmp_path / "run", name)["model"] for name in names]
    assert found["model"].keys() == states[0].keys()
    for name, weight in found["model"].items():
        mean = np.mean([state[name].double().numpy() for state in states], axis=0)
        assert np.array_equal(weight.numpy(), mean.astype(np.float32), equal_nan=True)
    shorter = ("--beam", "1", "--max-len-b", "5", "--max-len-a", "0", "--gen-subset", "test", "--cpu")
    generated = fairseq("generate", corpus / "bin", "--path", out, *PLUGIN, *shorter)
    assert generated.status == 0 and "Generate test with beam=1" in generated.output


def unsafe(run: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "path": PurePosixPath("a")}, run / "checkpoint11.pt")


@pytest.mark.parametrize(
    ("damage", "flags", "sentence"),
    [
        (
            lambda run: None,
            ["--last", "5"],
            "'{run}' has 4 checkpoints of epochs, not 5: train with --keep-last-",
        ),
        (
            lambda run: None,
            ["--last", "4", "--by", "updates"],
            "has 3 checkpoints of updates, not 4: train with",
        ),
        (lambda run: None, ["--last", "0"], "the number of checkpoints is 0, but it must be at least 1"),
        (
            lambda run: None,
            ["--checkpoints", "checkpoint7.pt"],
            "checkpoint '{run}/checkpoint7.pt' does not exist",
        ),
        (
            lambda run: None,
            ["--checkpoints", "checkpoint8.pt", "../run/checkpoint8.pt"],
            "'{run}/../run/checkpoint8.pt' is named twice",
        ),
        (
            lambda run: os.truncate(run / "checkpoint11.pt", 500),
            [],
            "checkpoint11.pt' is damaged or no checkpoint",
        ),
        (
            lambda run: (run / "checkpoint9.pt").write_text("hello"),
            [],
            "checkpoint9.pt' is damaged or no checkpoint",
        ),
        (lambda run: torch.save({}, run / "checkpoint9.pt"), [], "it has no weights under 'model'"),
        pytest.param(
            unsafe,
            [],
            "holds a pathlib.PurePosixPath, which is not loaded as it may run code",
            marks=pytest.mark.skipif(not SAFE, reason="this torch loads anything"),
        ),
        (lambda run: save(run / "checkpoint11.pt", v=torch.ones(1)), [], "is of another model than"),
        (lambda run: save(run / "checkpoint11.pt", w=torch.ones(2)), [], "is of another model than"),
        (
            lambda run: save(run / "checkpoint11.pt", w=torch.ones(1), v=torch.ones(1)),
            [],
            "'v' is not the same",
        ),
    ],
)
def test_what_cannot_be_averaged_is_refused_before_anything_is_written(
    run, averaged, tmp_path, damage, flags, sentence
):
    damage(run)
    out = tmp_path / "out" / "mean.pt"
    with pytest.raises(SystemExit, match=re.escape(sentence.format(run=run))) as refusal:
        averaged(run, out, *(flags or ["--last", "4"]))
    assert "\n" not in str(refusal.value)
    assert not out.parent.exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing(run, averaged, tmp_path):
    for epoch in (10, 11):
        save(run / f"checkpoint{epoch}.pt", w=torch.ones(100_000))
    out, limits = tmp_path / "out" / "mean.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=f"^averaging: '{out}' cannot be written: ") as refusal:
            averaged(run, out, "--last", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refusal.value)
    assert list(out.parent.iterdir()) == []


def test_an_impossible_out_is_refused(run, averaged, tmp_path):
    for out in (tmp_path, run / "checkpoint10.pt"):
        with pytest.raises(SystemExit, match=f"OUT is '{out}', "):
            averaged(run, out, "--last", "2")
    assert torch.load(run / "checkpoint10.pt")["model"]["w"].item() == 10.0
    with pytest.raises(SystemExit, match=r"nowhere' is no folder"):
        averaged(tmp_path / "nowhere", tmp_path / "mean.pt")
    with pytest.raises(SystemExit, match="2"):
        averaged(run, tmp_path / "mean.pt", "--checkpoints", "checkpoint8.pt", "--last", "1")
