"""Measures what an update of fairseq-train costs, in time and memory, with and without sharpness awareness.

    python -m recipes.benchmark.step_cost [--models NAME ...] [--optimizers FLAGS ...] [--max-tokens N]
        [--rounds N] [--device cpu|cuda] [--threads N] [--no-time | --no-memory] [--out FILE]

The optimizers, each with the flags that may follow --optimizer, train the same model on the same batches of
random sentences with fairseq's own Trainer. They take turns, update by update, so that other work of the
machine slows down all of them. Peak memory is that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fairseq_asam.files import write_json
from recipes.benchmark.trainers import (
    LONGEST_SENTENCE,
    MODELS,
    add_machine,
    configuration,
    machine,
    passes,
    trainer_and_batches,
    update_seconds,
    use_machine,
    write_corpus,
)
from recipes.options import at_least_1

OPTIMIZER_FLAGS = (
    "adam",
    "sam",
    "asam",
    "asam --ascent-fraction 0.5",
    "asam --ascent-fraction 0.25",
    "asam --ascent-interval 5",
    "asam --normalization adam",
    "sam --ascent-direction momentum",
    "asam --ascent-direction momentum",
)

_processes = multiprocessing.get_context("spawn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(MODELS),
        choices=list(MODELS),
        metavar="NAME",
        help=f"models (default: {' '.join(MODELS)})",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=OPTIMIZER_FLAGS,
        metavar="FLAGS",
        help="optimizers to measure; the first is what the others are compared to (default: "
        + " ".join(map(repr, OPTIMIZER_FLAGS))
        + ")",
    )
    defaults = ", ".join(f"{model.max_tokens} for {name}" for name, model in MODELS.items())
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"most tokens in a batch (default: {defaults})"
    )
    defaults = ", ".join(f"{model.rounds} for {name}" for name, model in MODELS.items())
    parser.add_argument(
        "--rounds",
        type=at_least_1,
        metavar="N",
        help="rounds to time, after one that warms up; each has at least 5 updates, and a whole number of "
        f"--ascent-interval (default: {defaults})",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--no-time", action="store_true", help="measure memory only")
    which.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    add_machine(parser)
    args = parser.parse_args()
    use_machine(parser, args)
    if args.max_tokens is not None and args.max_tokens < LONGEST_SENTENCE:
        parser.error(
            f"--max-tokens must be at least {LONGEST_SENTENCE}, which some sentences have, "
            f"not {args.max_tokens}"
        )

    setting = {"device": machine(args.device, args.threads), "torch": torch.__version__}
    print("{device}, torch {torch}".format(**setting))
    results = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(parser, args, name, Path(folder)))
    if args.out:
        write_json(args.out, {**setting, "models": results})


def measure(
    parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, data: Path
) -> dict[str, Any]:
    """Measure and print the figures of one model, and return them. *data* is a folder for its corpus."""
    model = MODELS[name]
    max_tokens = args.max_tokens or model.max_tokens
    write_corpus(data, model, max_tokens)
    cfgs = {
        flags: configuration(parser, data, model, flags, max_tokens, args.device)
        for flags in dict.fromkeys(args.optimizers)
    }
    # Any so many updates in a row have each optimizer's share of updates with two passes.
    group = math.lcm(*(getattr(cfg.optimizer, "ascent_interval", 1) for cfg in cfgs.values()))
    group *= math.ceil(5 / group)
    trainer, batches = trainer_and_batches(cfgs[args.optimizers[0]])
    weights = sum(parameter.numel() for parameter in trainer.model.parameters())
    tokens = statistics.mean(batch["ntokens"] for batch in batches)
    result = {"model": name, "weights": weights, "max_tokens": max_tokens, "target_tokens": tokens}
    del trainer
    print(f"\n{name}: {weights} weights, at most {max_tokens} tokens in a batch, {tokens:.0f} target tokens")
    if not args.no_time:
        result["rounds"] = model.rounds if args.rounds is None else args.rounds
        result["seconds"] = seconds(cfgs, group, result["rounds"], name)
    if not args.no_memory:
        result["memory"] = peaks(cfgs, weights, group + 1, args, name)
    return result


def seconds(cfgs: dict[str, Any], group: int, rounds: int, name: str) -> list[dict[str, Any]]:
    """Time updates, and print and return a row for each optimizer."""
    trainers = {}
    for flags, cfg in cfgs.items():
        trainers[flags], batches = trainer_and_batches(cfg)
    means: dict[str, list[float]] = {flags: [] for flags in trainers}
    batches = itertools.cycle(batches)
    bar = tqdm(total=(rounds + 1) * group * len(trainers), desc=name, unit="update", disable=None)
    for _ in range(rounds + 1):
        total = dict.fromkeys(trainers, 0.0)
        for batch in itertools.islice(batches, group):
            for flags, trainer in trainers.items():
                total[flags] += update_seconds(trainer, batch)
                bar.update()
        for flags in trainers:
            means[flags].append(total[flags] / group)
    bar.close()

    base, *_ = cfgs
    print(f"\n| optimizer | seconds per update | ratio to {base} | passes |\n|:--|--:|--:|--:|")
    rows = []
    for flags, cfg in cfgs.items():
        times = means[flags][1:]  # the first round warms up
        row = {
            "optimizer": flags,
            "seconds": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, means[base][1:])),
            "passes": passes(cfg),
        }
        print("| {optimizer} | {seconds:.3f} | {ratio:.3f} | {passes:g} |".format(**row))
        rows.append(row)
    return rows


def peaks(
    cfgs: dict[str, Any], weights: int, updates: int, args: argparse.Namespace, name: str
) -> list[dict[str, Any]]:
    """Measure peak memory, and print and return a row for each optimizer."""
    # Let glibc give back what torch frees: it would keep more or less of it, as chance has it.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**13))
    peak = {}
    for flags, cfg in tqdm(cfgs.items(), desc=f"{name}, memory", unit="process", disable=None):
        with _processes.Pool(1) as process:
            peak[flags] = process.apply(peak_bytes, (cfg, args.threads, updates))

    base, *_ = cfgs
    print(f"\n| optimizer | peak, MB | copies of the weights above {base} | share of {base} and one copy |")
    print("|:--|--:|--:|--:|")
    rows = []
    for flags in cfgs:
        row = {"optimizer": flags, "peak_bytes": peak[flags], **in_copies(peak[flags], peak[base], weights)}
        print(f"| {flags} | {peak[flags] / 1e6:.0f} | {row['copies']:.2f} | {row['share']:.3f} |")
        rows.append(row)
    return rows


def in_copies(peak: int, base: int, weights: int) -> dict[str, float]:
    """Return how many float32 copies of the *weights* a peak is above that of *base*, and its share of *base*
    and one copy. Peaks are in bytes."""
    copy = 4 * weights
    return {"copies": (peak - base) / copy, "share": peak / (base + copy)}


def peak_bytes(cfg: Any, threads: int, updates: int) -> int:
    """Return the most memory that this process takes, on the GPU if it uses one, in some updates."""
    torch.set_num_threads(threads)
    trainer, batches = trainer_and_batches(cfg)
    trainer.cuda_env = None  # with it, fairseq resets torch's peak after each update
    for batch in itertools.islice(itertools.cycle(batches), updates):
        update_seconds(trainer, batch)
    if trainer.cuda:
        return torch.cuda.max_memory_allocated()
    # ru_maxrss would begin with the memory of the parent.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


if __name__ == "__main__":
    main()
