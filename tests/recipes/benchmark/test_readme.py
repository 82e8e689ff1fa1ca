"""The figures that the benchmarks' README quotes are those of the files that it links."""

from __future__ import annotations

import json

from tests.commands import ROOT

README = " ".join((ROOT / "recipes" / "benchmark" / "README.md").read_text("utf-8").split())


def figures(name: str):
    return json.loads((ROOT / "recipes" / "results" / "benchmark" / f"{name}.json").read_text("utf-8"))


def by(key: str, rows: list[dict], value: str) -> dict[str, float]:
    return {row[key]: row[value] for row in rows}


def test_step_cost():
    models = figures("step_cost")["models"]
    large, small = (
        {name: f"{ratio:.2f}" for name, ratio in by("optimizer", model["seconds"], "ratio").items()}
        for model in models
    )

    def both(name: str) -> str:
        return f"{large[name]} and {small[name]}"

    assert f"with the large model sam costs {large['sam']} and asam {large['asam']} times adam" in README
    assert f"with the small one {small['sam']} and {small['asam']}, and Adam's metric" in README
    assert f"Adam's metric {both('asam --normalization adam')}." in README
    assert f"brings asam down to {both('asam --ascent-fraction 0.5')}, 0.25" in README
    assert f"0.25 to {both('asam --ascent-fraction 0.25')}, and" in README
    assert f"`--ascent-interval 5` to {both('asam --ascent-interval 5')}." in README
    sam, asam = (f"{optimizer} --ascent-direction momentum" for optimizer in ("sam", "asam"))
    assert f"momentum`, sam costs {both(sam)}, asam {both(asam)}: what" in README
    away = [
        max(abs(row["ratio"] - other["ratio"]) for row, other in zip(one["seconds"], two["seconds"]))
        for one, two in zip(models, figures("step_cost_second_call")["models"])
    ]
    assert f"up to {away[0]:.2f} away with the large model" in README
    assert f"up to {away[1]:.2f} with the small one" in README
    copies = by("optimizer", models[0]["memory"], "copies")
    assert f"asam takes {copies['asam']:.2f} copies of the weights" in README
    assert f"with `--ascent-interval 5` {copies['asam --ascent-interval 5']:.2f}." in README


def test_scale():
    result = figures("scale")
    assert f"one of {result['batch'][0]['weights'] / 1e6:.1f} million weights" in README
    shares = [row["overhead_share"] for row in result["batch"]]
    assert f"falls from {shares[0]:.1%} to {shares[-1]:.1%}." in README
    line = result["line"]
    assert f"{line['fixed_ms']:.1f} ms and {line['ms_per_million']:.2f} ms per million weights" in README
    assert f"to within {line['deviation']:.1%}." in README


def test_profile():
    share = by("stage", figures("profile")["stages"], "share")
    passes = sum(part for stage, part in share.items() if stage.startswith(("forward", "backward")))
    assert f"passes take {passes:.1%} of the time" in README
    assert f"to perturb and restore the weights takes {share['perturb'] + share['restore']:.1%}" in README
    assert f"the step of the optimizer {share['step of the optimizer']:.1%}." in README


def test_image_step_cost():
    ratios = {
        (row["model"], row["optimizer"]): f"{row['ratio']:.2f}"
        for row in figures("image_step_cost")["epochs"]
    }
    assert f"sam costs {ratios['resnet20', 'sam']} and asam {ratios['resnet20', 'asam']} times sgd" in README
    assert ratios["wrn16_8", "sam"] == ratios["wrn16_8", "asam"]
    assert f"both {ratios['wrn16_8', 'sam']} times sgd with WRN-16-8" in README


def test_perturbation():
    for threads, sentence in (
        (1, "takes {} to {} of the time of the fastest other"),
        (2, "{} to {} with two"),
    ):
        ratios = [
            figure["ratio"]
            for call in figures("perturbation")
            for figure in call["figures"]
            if figure["name"] == "fairseq_asam" and call["device"] == f"{threads} CPU threads"
        ]
        assert len(ratios) == 4
        assert sentence.format(f"{min(ratios):.2f}", f"{max(ratios):.2f}") in README


def test_launches():
    result = figures("launches")
    this, beside = result["versions"]
    fastest = this["minimum_us"] / beside["minimum_us"]
    assert f"Beside commit {beside['commit']}, on a core" in README
    assert f"{this['operations']} operations, where there were {beside['operations']}, views" in README
    assert (
        f"take {result['ratios']['time']:.2f} of the time in the median round, and {fastest:.2f} in" in README
    )
