"""Measures how the cost of an update with asam, beside one with adam, changes with the size of the model and
of the batch.

    python -m recipes.benchmark.scale [--widths N ...] [--tokens N ...] [--width N] [--max-tokens N]
        [--rounds N] [--device cpu|cuda] [--threads N] [--out FOLDER]

Models of 6 + 6 layers and several widths train on batches of --max-tokens tokens, and one of --width on
batches of several sizes. asam and adam take turns on the same batches. The overhead is what an update with
asam spends outside of its two forward and backward passes, less what one with adam spends outside of its own:
the perturbation and its restoration, and what the plugin keeps in order. Writes scale.json and scale.png.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

from fairseq_asam.files import write_json
from recipes.benchmark.trainers import (
    Model,
    Stopwatch,
    add_machine,
    check_max_tokens,
    configuration,
    machine,
    surround,
    trainer_and_batches,
    update_seconds,
    use_machine,
    write_corpus,
)
from recipes.options import at_least_1
from recipes.reporter import write_figure

HEAD = 64  # numbers in an attention head
VOCABULARY = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])

    def add(option: str, default: Any, text: str, **how: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        how = {"type": int, "metavar": "N", **how}
        parser.add_argument(option, default=default, help=f"{text} (default: {shown})", **how)

    add("--widths", (64, 128, 256, 448, 768), "widths of the models", nargs="+")
    add("--tokens", (256, 512, 1024, 2048, 4096), "most tokens in a batch", nargs="+")
    add("--width", 256, "width of the model that gets the batches of --tokens")
    add("--max-tokens", 512, "most tokens in a batch for the models of --widths")
    add("--rounds", 10, "rounds of updates to time, after one that warms up", type=at_least_1)
    add("--out", Path("runs/benchmark"), "folder to write to", type=Path, metavar="FOLDER")
    add_machine(parser)
    args = parser.parse_args()
    use_machine(parser, args)
    for width in (*args.widths, args.width):
        if width < HEAD or width % HEAD:
            parser.error(f"a width must be a multiple of {HEAD}, the width of an attention head, not {width}")
    for max_tokens in (*args.tokens, args.max_tokens):
        check_max_tokens(parser, "a number of tokens", max_tokens)
    for option in ("widths", "tokens"):
        if len(set(getattr(args, option))) < 2:
            parser.error(f"--{option} must be at least 2 numbers, to see what changes between them")

    settings = [
        *(("size", width, args.max_tokens) for width in sorted(set(args.widths))),
        *(("batch", args.width, max_tokens) for max_tokens in sorted(set(args.tokens))),
    ]
    rows: dict[str, list[dict[str, Any]]] = {"size": [], "batch": []}
    with tqdm(total=len(settings), unit="setting", disable=None) as bar:
        for which, width, max_tokens in settings:
            bar.set_description(f"width {width}, {max_tokens} tokens")
            rows[which].append(measure(parser, args, width, max_tokens))
            bar.update()
    setting = {"device": machine(args.device, args.threads), "torch": torch.__version__}
    result = {**setting, "rounds": args.rounds, **rows, "line": line(rows["size"])}
    print("{device}, torch {torch}\n".format(**setting))
    print(report(result))
    write_json(args.out / "scale.json", result)
    write_figure(args.out / "scale.png", draw(result))


def model_of(width: int) -> Model:
    flags = "--arch transformer --dropout 0.1 --encoder-layers 6 --decoder-layers 6"
    for side in ("encoder", "decoder"):
        flags += f" --{side}-embed-dim {width} --{side}-ffn-embed-dim {4 * width}"
        flags += f" --{side}-attention-heads {width // HEAD}"
    return Model((VOCABULARY, VOCABULARY), 24.0, 0, flags)


def measure(
    parser: argparse.ArgumentParser, args: argparse.Namespace, width: int, max_tokens: int
) -> dict[str, Any]:
    """Return the figures of one model and one size of batch; seconds and ratio are medians of the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(width)
        write_corpus(Path(folder), model, max_tokens)
        trainers, watches = {}, {}
        for optimizer in ("adam", "asam"):
            cfg = configuration(parser, Path(folder), model, optimizer, max_tokens, args.device)
            trainer, batches = trainer_and_batches(cfg)
            trainers[optimizer], watches[optimizer] = trainer, Stopwatch(trainer.cuda)
            surround(trainer.criterion, "forward", watches[optimizer].running)
            surround(trainer.optimizer, "backward", watches[optimizer].running)
        seconds: dict[str, list[float]] = {o: [] for o in trainers}
        elsewhere: dict[str, list[float]] = {o: [] for o in trainers}
        batches = list(itertools.islice(itertools.cycle(batches), args.rounds + 1))
        for batch in batches:
            for optimizer, trainer in trainers.items():
                watches[optimizer].seconds = 0.0
                seconds[optimizer].append(update_seconds(trainer, batch))
                elsewhere[optimizer].append(seconds[optimizer][-1] - watches[optimizer].seconds)
    # The first round warms up.
    ratio = statistics.median(a / b for a, b in zip(seconds["asam"][1:], seconds["adam"][1:]))
    # The work outside of the passes is the same in every round: what comes on top is not ours.
    overhead = min(elsewhere["asam"][1:]) - min(elsewhere["adam"][1:])
    asam = statistics.median(seconds["asam"][1:])
    return {
        "width": width,
        "weights": sum(parameter.numel() for parameter in trainers["adam"].model.parameters()),
        "max_tokens": max_tokens,
        "target_tokens": statistics.mean(batch["ntokens"] for batch in batches[1:]),
        "adam_seconds": statistics.median(seconds["adam"][1:]),
        "asam_seconds": asam,
        "ratio": ratio,
        "overhead_ms": 1e3 * overhead,
        "overhead_share": overhead / asam,
    }


def line(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the straight line, overhead over weights, that is relatively nearest to the *rows*, and how far,
    relatively, it is from the farthest."""
    millions, overhead = (np.array([row[key] for row in rows]) for key in ("weights", "overhead_ms"))
    millions = millions / 1e6
    slope, fixed = np.polyfit(millions, overhead, 1, w=1 / np.maximum(np.abs(overhead), 1e-3))
    deviation = np.max(np.abs((fixed + slope * millions) / overhead - 1))
    return {"fixed_ms": float(fixed), "ms_per_million": float(slope), "deviation": float(deviation)}


def report(result: dict[str, Any]) -> str:
    """Return the figures as two tables, and what they say of the overhead."""
    lines = []
    for which in ("size", "batch"):
        lines += [
            "| million weights | target tokens | adam, s | asam, s | asam / adam | overhead, ms "
            "| per million weights, ms | share of the update |",
            "|--:" * 8 + "|",
        ]
        for row in result[which]:
            millions = row["weights"] / 1e6
            lines.append(
                f"| {millions:.1f} | {row['target_tokens']:.0f} | {row['adam_seconds']:.3f} "
                f"| {row['asam_seconds']:.3f} | {row['ratio']:.3f} | {row['overhead_ms']:.1f} "
                f"| {row['overhead_ms'] / millions:.2f} | {row['overhead_share']:.1%} |"
            )
        lines.append("")
    shares = [row["overhead_share"] for row in result["batch"]]
    shrinks = "falls" if all(a > b for a, b in zip(shares, shares[1:])) else "does not always fall"
    fit = result["line"]
    return "\n".join(lines) + (
        f"\nThe overhead's share of the update {shrinks} as batches grow, from {shares[0]:.1%} to "
        f"{shares[-1]:.1%}.\nThe overhead is within {fit['deviation']:.0%} of {fit['fixed_ms']:.1f} ms and "
        f"{fit['ms_per_million']:.2f} ms per million weights, at every size."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Return a figure of four panels: the ratio and the overhead, over weights and over tokens."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    millions = [row["weights"] / 1e6 for row in result["size"]]
    tokens = [row["target_tokens"] for row in result["batch"]]
    style = {"marker": "o", "color": "C0"}
    for axis, x, rows in ((axes[0][0], millions, result["size"]), (axes[0][1], tokens, result["batch"])):
        axis.plot(x, [row["ratio"] for row in rows], **style)
        axis.axhline(2, color="grey", linestyle="dashed", linewidth=1)
        # within a tenth of 2, or noise of a percent would look like a trend
        low, high = axis.get_ylim()
        axis.set(ylabel="asam / adam, seconds per update", xscale="log", ylim=(min(low, 1.8), max(high, 2.2)))
        axis.set_xticks(x, [f"{value:.0f}" for value in x])
        axis.minorticks_off()
    axes[1][0].plot(millions, [row["overhead_ms"] for row in result["size"]], **style)
    fit = result["line"]
    axes[1][0].plot(
        millions,
        [fit["fixed_ms"] + fit["ms_per_million"] * m for m in millions],
        color="grey",
        linestyle="dashed",
        linewidth=1,
        label=f"{fit['fixed_ms']:.1f} ms + {fit['ms_per_million']:.2f} ms per million weights",
    )
    axes[1][0].legend()
    axes[1][0].set(xlabel="million weights", ylabel="overhead beyond two passes (ms)", yscale="log")
    axes[1][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1][0].yaxis.set_major_formatter("{x:g}")
    axes[1][0].yaxis.set_minor_formatter(NullFormatter())
    axes[1][1].plot(tokens, [100 * row["overhead_share"] for row in result["batch"]], **style)
    axes[1][1].set(xlabel="target tokens in a batch", ylabel="overhead, % of an update with asam")
    axes[1][1].set_ylim(bottom=0)
    return figure


if __name__ == "__main__":
    main()
