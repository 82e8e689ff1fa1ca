"""Counts the operations of one perturbation in the form for accelerators, and times the host.

    python -m recipes.benchmark.launches [--beside FOLDER] [--rounds N] [--out FILE]

The weights are those of transformer_iwslt_de_en, shrunk to one number each, so that only overhead remains. No
accelerator is needed: a CPU computes in the form for accelerators, by copies of the files of
fairseq_asam/sharpness in which no device is a CPU. FOLDER is a checkout of another version. Both take turns
of ten perturbations, in another order each round.
"""

from __future__ import annotations

import argparse
import importlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from fairseq_asam.files import write_json
from recipes.benchmark.perturbation import RHO, transformer
from recipes.options import at_least_1

ROOT = Path(__file__).resolve().parents[2]
#: Perturbations of a turn. The first ones find the cache cold after the turn of the other version.
TURN = 10


class Operations(TorchDispatchMode):
    """Counts by name the operations that torch dispatches; with those that only make another view."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--beside", type=Path, metavar="FOLDER", help="checkout of another version, to compare with"
    )
    parser.add_argument("--rounds", type=at_least_1, default=50, help="rounds to time (default: 50)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    args = parser.parse_args()
    checkouts = {"this": ROOT, **({"beside": args.beside} if args.beside else {})}
    for checkout in checkouts.values():
        if not (checkout / "fairseq_asam" / "sharpness" / "kernels.py").is_file():
            parser.error(f"--beside {checkout}: there is no fairseq_asam/sharpness/kernels.py in this folder")

    torch.set_num_threads(1)
    weights = [(name, torch.ones([1] * w.dim())) for name, w in transformer().named_parameters()]
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        perturbations = {
            name: perturbation_of(for_accelerators(checkout, Path(folder) / f"sharpness_of_{name}"), weights)
            for name, checkout in checkouts.items()
        }
        seconds = measure(perturbations, args.rounds)
    rows = []
    for name, checkout in checkouts.items():
        operations = Operations()
        with operations, perturbations[name]:
            pass
        row = {"name": name, "commit": commit_of(checkout), "operations": sum(operations.names.values())}
        row.update(median_us=1e6 * statistics.median(seconds[name]), minimum_us=1e6 * min(seconds[name]))
        rows.append({**row, "by_name": dict(operations.names.most_common())})
    print(f"{len(weights)} weights of one number each, torch {torch.__version__}\n")
    print("| | commit | operations | median µs | minimum µs |\n|:--|:--|--:|--:|--:|")
    for row in rows:
        print("| {name} | {commit} | {operations} | {median_us:.0f} | {minimum_us:.0f} |".format(**row))
    ratios = ratios_of(rows, seconds) if args.beside else None
    if ratios:
        print("\nthis / beside: {operations:.3f} of the operations, {time:.3f} of the time".format(**ratios))
    if args.out:
        setting = {"weights": len(weights), "rounds": args.rounds, "torch": torch.__version__}
        write_json(args.out, {**setting, "versions": rows, "ratios": ratios})


def for_accelerators(checkout: Path, copy: Path) -> ModuleType:
    """Return the core of *checkout* from *copy*, a new folder on the path, where no device is a CPU."""
    shutil.copytree(checkout / "fairseq_asam" / "sharpness", copy)
    for file in copy.glob("*.py"):
        file.write_text(re.sub(r'(\.type [!=]= )"cpu"', r'\1"none"', file.read_text("utf-8")), "utf-8")
    return importlib.import_module(copy.name)


def perturbation_of(core: ModuleType, weights: list[tuple[str, torch.Tensor]]) -> Any:
    """Return a perturbation of parameters like *weights*, which have gradients."""
    parameters = [(name, nn.Parameter(weight.clone())) for name, weight in weights]
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return core.Perturbation(parameters, rho=RHO)


def measure(perturbations: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Return the processor's seconds of each perturbation and its undoing. One round before warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in perturbations}
    order = random.Random(0)
    for _ in tqdm(range(1 + rounds), unit="round", disable=None):
        for name in order.sample(list(perturbations), len(perturbations)):
            for _ in range(TURN):
                begin = time.thread_time()
                with perturbations[name]:
                    pass
                seconds[name].append(time.thread_time() - begin)
    return {name: times[TURN:] for name, times in seconds.items()}


def ratios_of(rows: list[dict[str, Any]], seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return the ratios of this version to the one beside it: of operations, and the median one of times."""
    this, beside = (row["operations"] for row in rows)
    times = [one / other for one, other in zip(seconds["this"], seconds["beside"])]
    return {"operations": this / beside, "time": statistics.median(times)}


def commit_of(checkout: Path) -> str:
    """Return the commit of *checkout*; "unknown" if git does not know it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
