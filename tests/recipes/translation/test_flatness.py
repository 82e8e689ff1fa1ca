from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.translation.flatness import correlation, system_of
from tests.commands import run_module
from tests.recipes.translation.scripts import refusal, script, succeeded


def test_the_figures_are_those_that_measuring_prints(corpus: Path, runs: list[Path], tmp_path: Path):
    flags = ["--split", "test", "--rho", "0.1", "0.2", "--batches", "3"]
    printed = succeeded(script("flatness", corpus, tmp_path, *runs, *flags)).stdout
    assert printed == (tmp_path / "flatness.md").read_text()
    assert (tmp_path / "flatness.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "flatness.json").read_text())
    assert [run["system"].partition(",")[0] for run in found["runs"]] == ["adam", "asam"]
    for run, folder in zip(found["runs"], runs):
        command = ["fairseq_asam.measuring", corpus / "bin", "--path", folder / "checkpoint_best.pt"]
        command += ["--gen-subset", "train", "--batches", "3", "--rho", "0.1", "0.2"]
        run_module(*command, "--json", tmp_path / "measured.json").check_returncode()
        measured = json.loads((tmp_path / "measured.json").read_text())
        assert run["training loss"] == pytest.approx(measured["loss"])
        for region in measured["regions"]:
            rho = f"rho {region['rho']:g}"
            assert run["measures"][f"sharpness, {rho}"] == pytest.approx(region["sharpness"])
            assert run["measures"][f"adaptive sharpness, {rho}"] == pytest.approx(
                region["adaptive_sharpness"]
            )
        assert run["BLEU"] == json.loads((folder / "test.json").read_text())["BLEU"]


def test_tau_by_hand():
    """Of the six pairs of systems, five have the higher BLEU with the higher sharpness, on average."""
    figures = ((1, 20), (2, 22), (3, 21), (4, 23))
    runs = [
        {"system": str(s), "measures": {"sharpness": s + shift}, "BLEU": b - 3 * shift}
        for s, b in figures
        for shift in (-2, 0, 2)
    ]
    assert correlation(runs, "sharpness")["tau"] == pytest.approx((5 - 1) / 6)


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--max-epoch", "3", "--seed", "2"], "asam, rho 0.1, 3 epochs"),
        (
            ["--seed", "1", "--rho", "0.1", "--ascent-from", "0.9", "--seed", "2"],
            "asam, rho 0.1, 3 epochs, --ascent-from 0.9",
        ),
    ],
)
def test_a_system_is_what_its_seeds_share(flags: list[str], name: str, tmp_path: Path):
    options = {"optimizer": "asam", "rho": 0.1, "epochs": 3, "seed": 2, "flags": flags}
    (tmp_path / "run.json").write_text(json.dumps({"options": options, "finished": True}))
    assert system_of(tmp_path) == name


def test_bad_input_is_named_in_one_sentence(corpus: Path, runs: list[Path], tmp_path: Path):
    assert "is missing: train the run and translate" in refusal("flatness", corpus, tmp_path, tmp_path / "no")
    message = refusal("flatness", corpus, tmp_path, runs[0], runs[0], "--split", "test")
    assert message.startswith("flatness.py: all runs are of one system, 'adam, ")
    message = refusal("flatness", corpus, tmp_path, *runs, "--split", "test", "--rho", "-1")
    assert message.startswith("flatness.py: ") and "-1" in message
    message = refusal("flatness", corpus, tmp_path, *runs, "--batches", "0")
    assert message.endswith("--batches: must be a whole number from 1, not 0")
