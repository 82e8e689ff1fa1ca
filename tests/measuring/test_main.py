"""``python -m fairseq_asam.measuring`` on a tiny corpus with tiny models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_asam.measuring import __main__ as measuring
from fairseq_asam.measuring.fairseq_checkpoints import load
from tests.commands import ROOT
from tests.measuring.edited import edited


def used_weights(loaded):
    """fairseq 0.12.2 has weights that it uses in inference alone, and never in a loss."""
    return {name: p for name, p in loaded.model.named_parameters() if p.grad is not None}


def sentence_by_sentence(path: str, data: str, move=None) -> float:
    """The loss per token of the sentences one by one, after the weights moved by what *move* makes of name,
    weights and gradients."""
    loaded = load(path, data, cpu=True)
    loaded.task.load_dataset("valid")
    dataset = loaded.task.dataset("valid")

    def loss_at_weights(with_gradient: bool) -> float:
        total, tokens = 0.0, 0
        for i in range(len(dataset)):
            loss, size, _ = loaded.criterion(loaded.model, dataset.collater([dataset[i]]))
            if with_gradient:
                loss.backward()
            total, tokens = total + loss.item(), tokens + size
        return total / tokens

    loss = loss_at_weights(True)
    if move is None:
        return loss
    weights = {name: p.detach().clone() for name, p in used_weights(loaded).items()}
    gradients = {name: p.grad for name, p in used_weights(loaded).items()}
    with torch.no_grad():
        for name, p in used_weights(loaded).items():
            p += move(name, weights, gradients)
        return loss_at_weights(False)


def test_the_figures_are_those_of_the_definition(command, adam, data, tmp_path):
    rho, eta = 0.3, 0.02

    def sam(name, weights, gradients):
        return rho * gradients[name] / torch.cat([g.flatten() for g in gradients.values()]).norm()

    def asam(name, weights, gradients):
        diagonals = {n: 1.0 if n.endswith("bias") else w.abs() + eta for n, w in weights.items()}
        norm = torch.cat([(diagonals[n] * g).flatten() for n, g in gradients.items()]).norm()
        return rho * diagonals[name] ** 2 * gradients[name] / norm

    at_w, after_sam, after_asam = (sentence_by_sentence(adam, data, move) for move in (None, sam, asam))
    out = command(
        measuring, data, "--path", adam, "--rho", rho, 0.1, "--eta", eta, "--json", tmp_path / "out.json"
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["loss"] == pytest.approx(at_w, rel=1e-5)
    first = written["regions"][0]
    assert first["sharpness"] == pytest.approx(after_sam - at_w, rel=1e-3)
    assert first["adaptive_sharpness"] == pytest.approx(after_asam - at_w, rel=1e-3)
    assert first["non_finite"] == 0
    for row in written["regions"]:
        assert f"| 2 | {row['rho']:g} | {row['sharpness']:.6f} | {row['adaptive_sharpness']:.6f} |" in out
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_projected_ascent_and_other_norms(command, asam, data, tmp_path):
    flags = ["--rho", 0.05, "--p-norm", 2, "inf", "--batches", 2, "--seed", 3, "--max-tokens", 200]
    rows = []
    for more in ([], ["--steps", 4, "--restarts", 2]):
        command(measuring, data, "--path", asam, *flags, *more, "--json", tmp_path / "out.json")
        written = json.loads((tmp_path / "out.json").read_text())
        assert written["batches"] == 2 and written["sentences"] < 100
        rows.append(written["regions"])
    assert [row["p"] for row in rows[0]] == ["2", "inf"]
    for one_step, projected in zip(*rows):
        for key in ("sharpness", "adaptive_sharpness"):
            assert projected[key] >= one_step[key] - 1e-6


def other_language(folder: Path) -> None:
    """Make the references German, too, which the model never learnt to write."""
    for file in folder.glob("valid.de-en.en.*"):
        shutil.copy(folder / file.name.replace(".en.", ".de."), file)


def test_a_loss_worse_than_guessing_is_pointed_out(command, adam, data, tmp_path):
    flags = ["--path", adam, "--batches", 2, "--rho", 0.1]
    assert "guessing" not in command(measuring, data, *flags)
    other = edited(data, tmp_path / "other", other_language)
    assert f"is '{other}' the data set of its training?" in command(measuring, other, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--path", "none.pt"], "measuring: the checkpoint 'none.pt' does not exist."),
        (["--path", "none.pt", "--rho", "-1"], "measuring: rho is -1.0, but"),
        (["--path", str(ROOT)], "measuring: [Errno 21] Is a directory"),
    ],
)
def test_a_mistake_ends_the_command_with_a_line(command, data, flags, message):
    with pytest.raises(SystemExit) as end:
        command(measuring, data, *flags)
    assert str(end.value).startswith(message)
    assert "\n" not in str(end.value)


def test_the_command_line_prints_nothing_but_the_table(adam, data):
    process = subprocess.run(
        [sys.executable, "-m", "fairseq_asam.measuring", data, "--path", adam, "--rho", "0.1"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert process.returncode == 0
    assert process.stderr == ""
    assert len(process.stdout.splitlines()) == 6
