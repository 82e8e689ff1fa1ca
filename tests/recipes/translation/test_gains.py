"""The picture of gains: what its rows are, against differences by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from recipes.translation import gains
from tests.commands import ROOT
from tests.recipes.translation.scripts import refusal


def row(system: str, *scores: float, seconds: float | None = None) -> dict:
    runs = [{"seed": seed, "test BLEU": score} for seed, score in enumerate(scores, start=1)]
    trained = {} if seconds is None else {"training_seconds": seconds}
    return {"system": system, "epochs": 3, "runs": runs, **trained}


def write(file: Path, *systems: dict) -> Path:
    file.write_text(json.dumps({"systems": systems}))
    return file


ADAM = row("Adam", 10.0, 12.0, 14.0, seconds=100)


def test_a_form_is_compared_with_adam_and_its_average_with_adams_average(tmp_path):
    table5 = write(
        *(tmp_path / "table5.json", ADAM, row("Adam+SAM", 11.0, 13.0, 18.0, seconds=200)),
        *(row("Adam, averaged", 11.0, 13.0, 15.0), row("Adam+SAM, averaged", 11.5, 13.5, 15.5)),
    )
    other = write(tmp_path / "gain_and_cost.json", ADAM, row("momentum, SAM", 9.0, 11.0, 13.0, seconds=110))
    momentum, sam = gains.forms(gains.read([table5, other]))
    assert (momentum.name, momentum.time) == ("SAM, momentum", 1.1)
    assert (momentum.alone, momentum.averaged) == (gains.Gain(-1.0, [-1.0, -1.0]), None)
    assert (sam.name, sam.time, sam.alone.mean) == ("SAM", 2.0, 2.0)
    # Differences 1, 1 and 4: a standard error of 1, and t of 4.3027 with two degrees of freedom.
    assert sam.alone.interval == pytest.approx([2 - 4.3027, 2 + 4.3027], abs=1e-3)
    assert sam.averaged == gains.Gain(0.5, [0.5, 0.5])


def test_files_of_other_runs_are_refused(tmp_path):
    files = [
        write(tmp_path / "table5.json", ADAM),
        write(tmp_path / "other.json", row("Adam", 10.0, seconds=100)),
    ]
    assert "has other runs of 'Adam' than" in refusal("gains", tmp_path / "out.png", *files)
    assert not (tmp_path / "out.png").exists()


def test_the_picture_has_the_forms_in_rows(tmp_path):
    folder = ROOT / "recipes" / "results" / "translation" / "libreoffice_8000"
    systems = gains.read([folder / "table5.json", folder / "gain_and_cost.json"])
    (axes,) = gains.draw(systems).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[::-1] == [form.name for form in gains.forms(systems)]
    assert len(labels) == 6
    one_seed = [{**row, "runs": row["runs"][:1]} for row in systems]
    gains.draw(one_seed)


def test_a_random_epsilon_and_the_gains_in_other_languages_come_from_the_trial():
    folder = ROOT / "recipes" / "results" / "translation"
    files = [folder / "libreoffice_8000" / f"{name}.json" for name in ("table5", "gain_and_cost")]
    systems, trial = gains.read(files), json.loads((folder / "trial" / "trial.json").read_text())
    found = {form.name: form for form in gains.with_trial(gains.forms(systems), trial)}
    with_trial = {name for name, form in found.items() if form.in_trial}
    assert with_trial == {"SAM, momentum", "SAM, random ε (control)"}
    runs = {file.stem: json.loads(file.read_text())["test"] for file in (folder / "trial" / "runs").iterdir()}
    languages, differences = trial["tests"]["D1"]["BLEU"]["languages"], []
    for language, seed in itertools.product(languages, range(1, 8)):
        names = [f"{language}-{system}-{seed}" for system in ("momentum", "adam")]
        if all(name in runs for name in names):
            momentum, adam = (runs[name]["averaged"]["BLEU"] for name in names)
            differences.append(momentum - adam)
    assert found["SAM, momentum"].in_trial.mean == pytest.approx(sum(differences) / len(differences))
    (axes,) = gains.draw(systems, trial).axes
    assert [label.get_text() for label in axes.get_yticklabels()][::-1] == [*found]
