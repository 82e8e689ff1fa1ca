from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.translation.scripts import refusal, run, script, succeeded


@pytest.mark.slow
def test_rho_is_the_one_with_the_highest_validation_bleu(corpus: Path, tmp_path: Path):
    search = ("quickstart", "--data", corpus, "--out", tmp_path, "--optimizers", "asam", "--epochs", "3")
    search += ("--rho", "0.1", "50", "--jobs", "2", "--cpu", "--warmup-updates", "10", "--max-tokens", "150")
    printed = succeeded(script("rho_search", *search)).stdout
    points = json.loads((tmp_path / "rho_search.json").read_text())
    assert [point["rho"] for point in points] == [0.1, 50]
    for point in points:
        folder = tmp_path / f"asam-3-epochs-rho-{point['rho']:g}-seed-1"
        theirs = run("sacrebleu", corpus / "valid.en", "-i", folder / "valid.hyp", "--confidence", "-w", "6")
        theirs = json.loads(succeeded(theirs).stdout)
        assert theirs["score"] == pytest.approx(point["BLEU"], abs=1e-6)
        # sacrebleu prints no interval around a BLEU of 0.
        assert theirs.get("confidence_var", 0) == pytest.approx(point["ci95"], abs=1e-6)
        assert not (folder / "test.hyp").exists()
    assert points[0]["BLEU"] > points[1]["BLEU"]
    assert "asam: the best rho is 0.1" in printed
    assert (tmp_path / "rho_search.png").read_bytes().startswith(b"\x89PNG")


def test_values_searched_before_are_not_run_again(corpus: Path, tmp_path: Path):
    earlier, other, out = tmp_path / "earlier.json", tmp_path / "other.json", tmp_path / "out"
    points = [
        {"optimizer": "sam", "epochs": 30, "seed": 1, "rho": rho, "BLEU": bleu, "ci95": 1.0}
        for rho, bleu in ((0.1, 19.0), (0.2, 21.0), (0.5, 20.0))
    ]
    earlier.write_text(json.dumps([points[0], {**points[0], "seed": 2, "BLEU": 30.0}]))
    other.write_text(json.dumps(points[1:]))
    search = ("rho_search", "libreoffice_8000", "--data", corpus, "--out", out, "--optimizers", "sam")
    printed = succeeded(script(*search, "--rho", "0.1", "0.2", "--earlier-searches", earlier, other)).stdout
    assert printed == "sam: the best rho is 0.2\n"
    assert json.loads((out / "rho_search.json").read_text()) == points[:2]
    assert {file.name for file in out.iterdir()} == {"rho_search.json", "rho_search.png"}


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '[{"rho": 0.1}]'])
def test_what_is_no_earlier_search_is_refused(text: str | None, corpus: Path, tmp_path: Path):
    earlier, out = tmp_path / "earlier.json", tmp_path / "out"
    if text is not None:
        earlier.write_text(text)
    arguments = ("libreoffice_8000", "--data", corpus, "--out", out, "--earlier-searches", earlier)
    message = refusal("rho_search", *arguments)
    named = f"--earlier-searches is '{earlier}', which is no rho_search.json: name the file of a search."
    assert message == named
    assert not out.exists()


def test_an_earlier_search_of_another_setup_is_refused(corpus: Path, tmp_path: Path):
    earlier, out = tmp_path / "earlier.json", tmp_path / "out"
    point = {"optimizer": "sam", "epochs": 30, "seed": 1, "rho": 0.1, "BLEU": 19.0, "ci95": 1.0}
    earlier.write_text(json.dumps([{**point, "setup": "iwslt14"}]))
    arguments = ("libreoffice_8000", "--data", corpus, "--out", out, "--earlier-searches", earlier)
    message = refusal("rho_search", *arguments)
    assert message == f"--earlier-searches is '{earlier}', a search of iwslt14: name one of libreoffice_8000."
    assert not out.exists()


@pytest.mark.parametrize("name", ["rho_search", "table5", "gain_and_cost"])
def test_bad_input_is_named_in_one_sentence(name: str, corpus: Path, tmp_path: Path):
    arguments = ("libreoffice_8000", "--data", corpus, "--out", tmp_path)
    message = refusal(name, *arguments, "--epochs", "0")
    assert message.endswith("error: argument --epochs: must be a whole number from 1, not 0")
    assert refusal(name, *arguments, "--jobs", "0") == "--jobs is 0, but it must be at least 1."
    for flags in (["--max-epoch=2"], ["--keep-last-epochs", "3"]):
        flag = flags[0].partition("=")[0]
        assert refusal(name, *arguments, *flags).startswith(f"The experiment itself gives {flag} to each")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", ["adam", ""])
def test_an_optimizer_without_rho_is_refused_before_any_run(optimizer: str, corpus: Path, tmp_path: Path):
    arguments = ("libreoffice_8000", "--data", corpus, "--out", tmp_path, "--optimizers", "sam", optimizer)
    message = refusal("rho_search", *arguments)
    assert message == f"'{optimizer}' has no rho to search: begin with sam or asam."
    assert list(tmp_path.iterdir()) == []
