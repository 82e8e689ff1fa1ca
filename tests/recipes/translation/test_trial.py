"""The trial's command, with a tiny model, and its tests, from figures that are made up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fairseq_asam.files import write_json
from recipes.translation.trial import PARTS, PEAKS, SEEDS, SIZES, Planned, best_peak, write_tables
from recipes.translation.trial_tables import TESTS, compare
from tests.recipes.translation.scripts import FLAGS, refusal, script, succeeded

D1, D2 = (TESTS[name][1:] for name in ("D1", "D2"))


def made_up(gains: dict[str, float], seeds: int = 5, noise: float = 0.1) -> dict:
    """Results of four languages in which each system gains over Adam what *gains* says, and *noise*."""
    random = np.random.default_rng(1)
    return {
        (language, system, seed): {
            "test": {
                weights: {metric: 20 + gain + noise * random.normal() for metric in ("BLEU", "chrF2")}
                for weights in ("best", "averaged")
            }
        }
        for language, of_language in SEEDS.items()
        for seed in of_language[:seeds]
        for system, gain in {"adam": 0.0, **gains}.items()
    }


def test_intervals_are_those_of_a_t_test_over_languages_and_over_all_differences():
    found = made_up({"momentum": 0.5, "random": 0.2})
    for (one, other), name in ((D1, "adam"), (D2, "random")):
        assert other == (name, "averaged")
        result = compare(found, SEEDS, (one, other))
        for metric in ("BLEU", "chrF2"):
            differences = np.array(
                [
                    [
                        found[language, "momentum", seed]["test"]["averaged"][metric]
                        - found[language, name, seed]["test"]["averaged"][metric]
                        for seed in seeds
                    ]
                    for language, seeds in SEEDS.items()
                ]
            )
            pooled = {"over languages": differences.mean(1), "over languages and seeds": differences.ravel()}
            for over, values in pooled.items():
                bounds = stats.ttest_1samp(values, 0).confidence_interval(0.95)
                assert result[metric][over]["interval"] == pytest.approx([bounds.low, bounds.high])
                assert result[metric][over]["mean"] == pytest.approx(values.mean())


@pytest.mark.parametrize(
    ("gains", "seeds", "verdicts"),
    [
        ({"momentum": 0.5, "random": 0.0}, 5, ("won", "won")),
        ({"momentum": 0.5, "random": 0.5}, 5, ("won", "lost")),
        ({"momentum": -0.5, "random": 0.0}, 5, ("lost", "lost")),
        ({"momentum": 0.5, "random": 0.0}, 3, ("won", "won")),
        ({"momentum": 0.5, "random": 0.0}, 2, (None, None)),
    ],
)
def test_a_verdict_is_that_of_the_plan(gains, seeds, verdicts):
    found = made_up(gains, seeds)
    assert tuple(compare(found, SEEDS, pair)["verdict"] for pair in (D1, D2)) == verdicts


def test_a_gain_in_some_languages_alone_is_uncertain():
    found = made_up({"momentum": 0.0, "random": 0.0})
    for (language, system, _), run in found.items():
        if system == "momentum" and language in ("fr", "cs"):
            run["test"]["averaged"]["BLEU"] += 1.0
    assert compare(found, SEEDS, D1)["verdict"] == "uncertain"


def test_pooled_intervals_take_the_seeds_that_all_languages_have():
    found = made_up({"momentum": 0.5})
    del found["ru", "momentum", 5], found["fr", "adam", 7]  # each is the fifth of its language
    result = compare(found, SEEDS, D1)
    assert result["seeds"] == 4 and result["BLEU"]["over languages and seeds"]["n"] == 16
    assert [each["n"] for each in result["BLEU"]["languages"].values()] == [4, 5, 4, 5]
    empty = compare(found, SEEDS, D2)
    assert empty["seeds"] == 0 and empty["BLEU"]["over languages"] == {"n": 0, "mean": None, "interval": None}


def write_result(results: Path, planned: Planned, bleu: float) -> None:
    test = {weights: {"BLEU": bleu, "chrF2": bleu} for weights in ("best", "averaged")}
    found = {"epochs": [{"validation BLEU": bleu}], "test": test}
    write_json(results / "runs" / f"{planned.name}.json", found)


def test_the_runs_are_those_of_the_plan_and_the_peak_is_chosen_by_validation(tmp_path):
    assert not list(PARTS["decay"](tmp_path))
    for planned, bleu in zip(PARTS["peaks"](tmp_path), (18.0, 20.5, 20.6, 19.0, 12.0)):
        assert best_peak(tmp_path) is None
        write_result(tmp_path, planned, bleu)
    assert best_peak(tmp_path) == PEAKS[2] == "1.5e-3"
    runs = {name: list(part(tmp_path)) for name, part in PARTS.items()}
    assert {name: len(part) for name, part in runs.items()} == SIZES
    names = [run.name for part in runs.values() for run in part]
    assert len(names) == len(set(names)) and names.count("fr_decay_1.5e-3-adam-3") == 1
    # Wherever it stops, no language has more than one seed more than another.
    order = [run.corpus for run in runs["languages"]]
    assert order == [*3 * ["fr"], *3 * ["cs"], *3 * ["ru"], *3 * ["es"]] * 5


def test_without_a_corpus_the_command_that_makes_it_is_named(tmp_path):
    folders = ("--data", tmp_path, "--out", tmp_path, "--results", tmp_path)
    said = refusal("trial", *folders, "--parts", "languages")
    assert said.startswith(f"'{tmp_path}' holds no corpus") and "--source-language fr" in said


@pytest.mark.parametrize(
    ("best", "said"),
    [(0, "7e-4, the lowest tried, to"), (2, "1.5e-3 to"), (-1, "3e-3, the highest tried, to")],
)
def test_the_table_says_that_the_best_peak_is_the_first_or_the_last(best, said, tmp_path, capsys):
    for planned, peak in zip(PARTS["peaks"](tmp_path), PEAKS):
        write_result(tmp_path, planned, 20.0 if peak == PEAKS[best] else 10.0)
    write_tables(tmp_path)
    assert f"fr, 8,000 pairs, a learning rate that decays from {said} 0, mean" in capsys.readouterr().out


def test_flags_that_the_trial_gives_each_run_are_refused(tmp_path):
    said = refusal("trial", "--results", tmp_path, "--seed=7")
    assert said.startswith("The experiment itself gives --seed to each training")


def test_other_flags_than_the_plans_need_another_folder_of_results():
    said = refusal("trial", "--at-most", "0", "--max-epoch", "2")
    assert said.startswith("trial.py: with --max-epoch 2 these are no runs of the plan: name another folder")


def test_the_papers_model_is_not_trained_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    said = refusal("trial", "--out", tmp_path, "--results", tmp_path, "--parts", "large")
    assert said.startswith("trial.py: the part large needs a GPU, and none was found")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "name", "optimizer"), [("controls", "de-nadam-1", "nadam"), ("large", "de_large-adam-1", "adam")]
)
def test_a_run_is_kept_as_one_file_and_not_made_again(part, name, optimizer, corpus: Path, tmp_path: Path):
    out, results = tmp_path / "out", tmp_path / "results"
    command = ("--data", corpus, "--results", results, "--parts", part, "--at-most")
    flags = (*FLAGS, "--max-epoch", "2")
    printed = succeeded(script("trial", *command, "1", "--out", out, *flags)).stdout
    (file,) = (results / "runs").iterdir()
    assert file.name == f"{name}.json"
    found = json.loads(file.read_text())
    assert found["options"]["optimizer"] == optimizer and found["options"]["seed"] == 1
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2]
    for weights, folder in (("best", ""), ("averaged", "average")):
        scores = json.loads((out / name / folder / "test.json").read_text())
        assert found["test"][weights] == {metric: scores[metric] for metric in ("BLEU", "chrF2")}
    assert not list(out.rglob("*.pt"))
    assert f" of the part {part}" in printed and f"{SIZES[part] - 1} of the part {part}" in printed
    assert printed == (results / "trial.md").read_text()
    assert (results / "trial.png").read_bytes().startswith(b"\x89PNG")
    # Elsewhere, only the file is needed.
    assert succeeded(script("trial", *command, "0", "--out", tmp_path / "elsewhere")).stdout == printed
    assert not (tmp_path / "elsewhere").exists()
