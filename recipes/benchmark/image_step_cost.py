"""Measures what an epoch of image classification costs with sgd, sam and asam.

    python -m recipes.benchmark.image_step_cost [--models NAME ...] [--batch-size N] [--updates N] [--out F]

An epoch is so many updates, as fairseq_asam.vision makes them, on random 32 x 32 images. The optimizers take
turns, update by update, so that other work of the machine slows down all of them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from fairseq_asam import Perturbation
from fairseq_asam.files import write_json
from fairseq_asam.vision.models import MODELS, build_model
from fairseq_asam.vision.update import Update
from recipes.options import at_least_1

CLASSES = 10
# Normalization operator and radius of each optimizer for CIFAR-10 (Section 5.2).
REGIONS = {"sgd": None, "sam": ("none", 0.05), "asam": ("element-wise", 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["resnet20", "wrn16_8"],
        choices=list(MODELS),
        metavar="NAME",
        help="networks (default: resnet20 wrn16_8)",
    )
    parser.add_argument("--batch-size", type=at_least_1, default=32, help="images in a batch (default: 32)")
    parser.add_argument("--updates", type=at_least_1, default=10, help="updates in an epoch (default: 10)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    epochs = {
        name: epoch_seconds(accelerator, name, arguments.batch_size, arguments.updates)
        for name in arguments.models
    }
    figures = [
        {"model": name, "optimizer": o, "seconds": seconds, "ratio": seconds / by_optimizer["sgd"]}
        for name, by_optimizer in epochs.items()
        for o, seconds in by_optimizer.items()
    ]
    device = accelerator.device.type
    print(
        f"{arguments.updates} updates on {arguments.batch_size} images, {device}, torch {torch.__version__}\n"
    )
    print("| model | optimizer | seconds | ratio to sgd |\n|---|---|---:|---:|")
    for figure in figures:
        print("| {model} | {optimizer} | {seconds:.3f} | {ratio:.3f} |".format(**figure))
    if arguments.out:
        setting = {"updates": arguments.updates, "batch_size": arguments.batch_size, "device": device}
        write_json(arguments.out, {**setting, "torch": torch.__version__, "epochs": figures})


def epoch_seconds(accelerator: Accelerator, model: str, batch_size: int, updates: int) -> dict[str, float]:
    """Return the seconds of an epoch by optimizer: the median update, times *updates*."""
    torch.manual_seed(0)
    start = build_model(model, CLASSES).to(memory_format=torch.channels_last)
    steps = {name: update_of(accelerator, copy.deepcopy(start), region) for name, region in REGIONS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(updates + 1), desc=model, unit="update", disable=None):
        images = torch.randn(batch_size, 3, 32, 32).to(accelerator.device, memory_format=torch.channels_last)
        targets = torch.randint(CLASSES, (batch_size,), device=accelerator.device)
        for name, step in steps.items():
            begin = time.perf_counter()
            step(images, targets)
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    # the first update warms up
    return {name: updates * statistics.median(times[1:]) for name, times in seconds.items()}


def update_of(accelerator: Accelerator, model: torch.nn.Module, region: tuple[str, float] | None) -> Update:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    perturbation = None
    prepared, optimizer = accelerator.prepare(model, optimizer)
    if region is not None:
        normalization, rho = region
        perturbation = Perturbation(model.named_parameters(), rho, normalization=normalization)
    model.train()
    return Update(accelerator, prepared, optimizer, perturbation, label_smoothing=0.1)


if __name__ == "__main__":
    main()
