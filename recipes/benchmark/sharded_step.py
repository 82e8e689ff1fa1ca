"""Measures what an update costs with weights in shards (fully_shard), with and without sharpness awareness.

    python -m recipes.benchmark.sharded_step [--processes N] [--layers N] [--width N] [--context N]
        [--batch-size N] [--rounds N] [--updates N] [--out FILE]

The model and the update are those of recipes/language_model. adam, sam and asam take turns, update by update,
in the same processes, so that other work of the machine slows down all of them. Peak memory is that of
processes of their own for each.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from fairseq_asam import Perturbation, TwoPasses
from fairseq_asam.files import write_json
from recipes.language_model.command_line import REGIONS
from recipes.language_model.train import in_shards, update
from recipes.language_model.transformer import HEAD, LanguageModel
from recipes.options import at_least_1

OPTIMIZERS = ("adam", *REGIONS)
# Collectives of torch, and which argument has what a process gives to them.
COLLECTIVES = {
    "allgather": ("all-gather", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "allreduce": ("all-reduce", 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def add(option: str, default: int, text: str) -> None:
        text = f"{text} (default: {default})"
        parser.add_argument(option, type=at_least_1, default=default, metavar="N", help=text)

    add("--processes", 2, "processes, with one thread each")
    add("--layers", 8, "layers of the model")
    add("--width", 512, f"width of the model, a multiple of {HEAD}")
    add("--context", 128, "bytes that the model sees")
    add("--batch-size", 16, "windows of all processes together")
    add("--rounds", 15, "rounds to time, after one that warms up")
    add("--updates", 8, "updates of a process whose memory is measured")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    args = parser.parse_args()
    if args.width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, not {args.width}")
    if args.batch_size % args.processes:
        parser.error(
            f"--batch-size must be a multiple of --processes {args.processes}, not {args.batch_size}"
        )

    weights = sum(w.numel() for w in LanguageModel(args.layers, args.width, args.context).parameters())
    result = {**{k: v for k, v in vars(args).items() if k != "out"}, "weights": weights}
    result["torch"] = torch.__version__
    print(f"{args.processes} processes on CPUs, torch {torch.__version__}, {weights} weights")
    result["seconds"] = print_seconds(in_processes(args, timed_and_counted)[0])
    # Let glibc give back what torch frees: it would keep more or less of it, as chance has it.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**13))
    result["memory"] = print_peaks({name: in_processes(args, peak_and_shard, name) for name in OPTIMIZERS})
    if args.out:
        write_json(args.out, result)


def in_processes(args: argparse.Namespace, function: Callable, *arguments: Any) -> list[Any]:
    """Return what ``function(args, *arguments)`` returned in each of so many new processes."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        calls = [(rank, args, store, function, arguments) for rank in range(args.processes)]
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(_call, calls))


def _call(call: tuple[int, argparse.Namespace, str, Callable, tuple[Any, ...]]) -> Any:
    rank, args, store, function, arguments = call
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store, rank=rank, world_size=args.processes, timeout=datetime.timedelta(minutes=5)
    )
    try:
        return function(args, *arguments)
    finally:
        dist.destroy_process_group()


def updating(args: argparse.Namespace, name: str) -> tuple[torch.nn.Module, Callable[[], None]]:
    """Return a new model, and what updates it with optimizer *name* on a random batch."""
    torch.manual_seed(0)
    model = LanguageModel(args.layers, args.width, args.context, dropout=0.1)
    in_shards(model, init_device_mesh("cpu", (args.processes,)), "fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    two_passes = None
    if name != "adam":
        normalization, rho = REGIONS[name]
        perturbation = Perturbation(model.named_parameters(), rho, normalization=normalization)
        two_passes = TwoPasses(perturbation, [model])
    batch = torch.randint(256, (args.batch_size // args.processes, args.context + 1))
    return model, lambda: update(model, optimizer, two_passes, [batch], 1.0)


def timed_and_counted(args: argparse.Namespace) -> dict[str, tuple[list[float], dict[str, int]]]:
    """Return the seconds of the updates with each optimizer, and the bytes that it sends in one."""
    updates = {name: updating(args, name)[1] for name in OPTIMIZERS}
    sent = {}
    for name, make_update in updates.items():
        with Traffic() as traffic:
            make_update()
        sent[name] = traffic.bytes
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    bar = tqdm(range(args.rounds + 1), unit="round", disable=None if dist.get_rank() == 0 else True)
    for _ in bar:
        for name, make_update in updates.items():
            dist.barrier()
            begin = time.perf_counter()
            make_update()
            dist.barrier()
            seconds[name].append(time.perf_counter() - begin)
    # the first round warms up
    return {name: (seconds[name][1:], sent[name]) for name in OPTIMIZERS}


class Traffic(TorchDispatchMode):
    """Adds up the bytes that this process gives to each kind of collective within the block.

    It does not see those of DTensors, which the sum for clipping is: 4 bytes with any optimizer.
    """

    def __init__(self):
        super().__init__()
        self.bytes = {kind: 0 for kind, _ in COLLECTIVES.values()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for part, (kind, position) in COLLECTIVES.items():
            if part in str(function):
                given = args[position]
                for tensor in given if isinstance(given, (list, tuple)) else [given]:
                    self.bytes[kind] += tensor.numel() * tensor.element_size()
        return function(*args, **(kwargs or {}))


def print_seconds(measured: dict[str, tuple[list[float], dict[str, int]]]) -> list[dict[str, Any]]:
    """Print and return a row for each optimizer."""
    print(
        "\n| optimizer | seconds per update | ratio to adam | all-gather, MB | reduce-scatter, MB |", end=""
    )
    print(" all-reduce, bytes |\n|:--|--:|--:|--:|--:|--:|")
    rows = []
    adam, _ = measured["adam"]
    for name, (seconds, sent) in measured.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, adam))
        rows.append(
            {"optimizer": name, "seconds": statistics.median(seconds), "ratio": ratio, "sent_bytes": sent}
        )
        megabytes = [f"{sent[kind] / 1e6:.2f}" for kind in ("all-gather", "reduce-scatter")]
        cells = [name, f"{rows[-1]['seconds']:.3f}", f"{ratio:.3f}", *megabytes, str(sent["all-reduce"])]
        print(f"| {' | '.join(cells)} |")
    return rows


def peak_and_shard(args: argparse.Namespace, name: str) -> tuple[int, int]:
    """Return the most memory that this process takes, and the bytes of its part of the weights."""
    model, make_update = updating(args, name)
    for _ in range(args.updates):
        make_update()
    # ru_maxrss would begin with the memory of the parent.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    return peak, sum(weight.to_local().nbytes for weight in model.parameters())


def print_peaks(measured: dict[str, list[tuple[int, int]]]) -> list[dict[str, Any]]:
    """Print and return a row for each optimizer, of the process that needs most beside what it should."""
    print("\n| optimizer | peak of a process, MB | copies of its shard above adam |", end="")
    print(" share of adam and one copy |\n|:--|--:|--:|--:|")
    rows = []
    for name, processes in measured.items():
        compared = [
            {"peak_bytes": peak, "copies": (peak - adam) / shard, "share": peak / (adam + shard)}
            for (peak, shard), (adam, _) in zip(processes, measured["adam"])
        ]
        rows.append({"optimizer": name, **max(compared, key=lambda row: row["share"])})
        cells = "{optimizer} | {peak:.0f} | {copies:.2f} | {share:.3f}"
        print(f"| {cells.format(**rows[-1], peak=rows[-1]['peak_bytes'] / 1e6)} |")
    return rows


if __name__ == "__main__":
    main()
