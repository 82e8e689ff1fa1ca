"""Shows where the time of a sharpness-aware update of fairseq-train goes, by torch's profiler.

    python -m recipes.benchmark.profile_step [--model NAME] [--optimizer FLAGS] [--max-tokens N] [--updates N]
        [--operators N] [--device cpu|cuda] [--threads N] [--trace FILE] [--out FILE]

The plugin and fairseq know nothing of it: their methods are wrapped from outside, in this process. With cuda,
each stage waits until the GPU has done its work, which makes the update a little slower than it is.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fairseq_asam import Perturbation
from fairseq_asam.files import whole, write_json
from recipes.benchmark.trainers import (
    MODELS,
    Trainer,
    add_machine,
    check_max_tokens,
    configuration,
    machine,
    surround,
    synchronize,
    trainer_and_batches,
    update_seconds,
    use_machine,
    write_corpus,
)
from recipes.options import at_least_1

UPDATE = "update"
STAGES = (
    "forward at w",
    "backward at w",
    "perturb",
    "forward at w + epsilon",
    "backward at w + epsilon",
    "restore",
    "step of the optimizer",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        default="transformer_iwslt_de_en",
        choices=list(MODELS),
        metavar="NAME",
        help=f"model to profile: {' or '.join(MODELS)} (default: transformer_iwslt_de_en)",
    )
    parser.add_argument(
        "--optimizer",
        default="asam",
        metavar="FLAGS",
        help="what follows --optimizer of fairseq-train (default: asam)",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens in a batch (default: the model's)"
    )
    parser.add_argument(
        "--updates", type=at_least_1, default=3, metavar="N", help="updates to profile (default: 3)"
    )
    parser.add_argument(
        "--operators", type=at_least_1, default=10, metavar="N", help="operators to list (default: 10)"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for chrome://tracing there")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    add_machine(parser)
    args = parser.parse_args()
    use_machine(parser, args)
    model = MODELS[args.model]
    max_tokens = model.max_tokens if args.max_tokens is None else args.max_tokens
    check_max_tokens(parser, "--max-tokens", max_tokens)

    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), model, max_tokens)
        cfg = configuration(parser, Path(folder), model, args.optimizer, max_tokens, args.device)
        trainer, batches = trainer_and_batches(cfg)
        update_seconds(trainer, batches[0])  # warms up, and makes the optimizer
        mark_stages(trainer)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * trainer.cuda
        with profile(activities=activities) as profiler:
            for number in range(args.updates):
                with record_function(UPDATE):
                    update_seconds(trainer, batches[(1 + number) % len(batches)])

    setting = {
        "model": args.model,
        "optimizer": args.optimizer,
        "max_tokens": max_tokens,
        "updates": args.updates,
        "device": machine(args.device, args.threads),
        "torch": torch.__version__,
    }
    heading = "{model}, {optimizer}, {max_tokens} tokens, {updates} updates, {device}, torch {torch}"
    print(heading.format(**setting))
    stages = stage_rows(profiler, args.updates)
    print("\n| stage | ms per update | share |\n|:--|--:|--:|")
    for row in stages:
        print("| {stage} | {ms:.1f} | {share:.1%} |".format(**row))
    operators = operator_rows(profiler, args.updates, trainer.cuda)[: args.operators]
    print("\n| operator | ms per update, by itself | calls per update |\n|:--|--:|--:|")
    for row in operators:
        print("| {operator} | {ms:.1f} | {calls:.0f} |".format(**row))
    if args.trace:
        with whole(args.trace) as file:
            profiler.export_chrome_trace(str(file))
    if args.out:
        write_json(args.out, {**setting, "stages": stages, "operators": operators})


def mark_stages(trainer: Trainer) -> None:
    """From now on, record the stages of an update of *trainer* under their names."""
    where = ["w"]

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        with record_function(name):
            yield
            synchronize(trainer.cuda)

    @contextlib.contextmanager
    def leaving(name: str, after: str) -> Iterator[None]:
        with stage(name):
            yield
        where[0] = after

    surround(trainer.criterion, "forward", lambda: stage(f"forward at {where[0]}"))
    surround(trainer.optimizer, "backward", lambda: stage(f"backward at {where[0]}"))
    surround(trainer.optimizer, "step", lambda: stage("step of the optimizer"))
    surround(Perturbation, "__enter__", lambda: leaving("perturb", "w + epsilon"))
    surround(Perturbation, "__exit__", lambda: leaving("restore", "w"))


def stage_rows(profiler: profile, updates: int) -> list[dict[str, Any]]:
    """Return what each stage takes of an update, in milliseconds and as a share of the whole."""
    ms: Counter[str] = Counter()
    for event in profiler.events():
        if event.name in (UPDATE, *STAGES) and event.device_type == torch.autograd.DeviceType.CPU:
            ms[event.name] += event.cpu_time_total / 1e3 / updates
    whole_update = ms.pop(UPDATE)
    rest = whole_update - sum(ms.values())
    figures = {**{name: ms[name] for name in STAGES if name in ms}, "the rest": rest, "all": whole_update}
    return [{"stage": name, "ms": value, "share": value / whole_update} for name, value in figures.items()]


def operator_rows(profiler: profile, updates: int, cuda: bool) -> list[dict[str, Any]]:
    """Return torch's operators, the slowest first; the time is that on the GPU if *cuda*."""
    rows = []
    for event in profiler.key_averages():
        # older torch has another name
        on_gpu = getattr(event, "self_device_time_total", None) or getattr(event, "self_cuda_time_total", 0)
        ms = (on_gpu if cuda else event.self_cpu_time_total) / 1e3 / updates
        if event.key.startswith("aten::"):
            rows.append({"operator": event.key, "ms": ms, "calls": event.count / updates})
    return sorted(rows, key=lambda row: -row["ms"])


if __name__ == "__main__":
    main()
