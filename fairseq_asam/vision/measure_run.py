"""Sharpness and adaptive sharpness of an image run, as a table and JSON.

The loss is cross-entropy in nats per image, without label smoothing. Network, data set, label noise and
held-out images are the run's. Images are not augmented. The network is in float32 and in evaluation mode:
batch normalization uses its running statistics.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fairseq_asam.measuring import command_line

from . import data, models
from .batches import evaluation_loader
from .options import add_options
from .run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of :func:`measure_run` to *parser*."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, which may still go on")
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default="train",
        help="training images, or those that the run evaluates on (default: %(default)s)",
    )
    add_options(parser, "data", "download")
    add_options(parser, "workers", default=0)
    add_options(parser, "batch_size", default=256, help="images of a forward pass")
    command_line.add_shared_options(parser, *command_line.OF_BATCHES, *command_line.OF_REGIONS)


def measure_run(args: argparse.Namespace) -> None:
    """Measure the last checkpoint of a run, print the table and write the JSON.

    Raises:
        ValueError: a value is not allowed, or there is no checkpoint.
        FileNotFoundError: the data set is missing.
    """
    regions = command_line.regions_of(args)
    for name, least in (("batches", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, but it must be at least {least}")
    checkpoint = RunFolder(args.run, {}).checkpoint()
    if checkpoint is None:
        raise ValueError(
            f"'{args.run}' has no checkpoint.pt: give the folder of a run that has finished an epoch"
        )
    options = checkpoint["options"]
    images = images_of(options, args.split, args.data, args.download)
    if args.batches is not None:
        images = at_random(images, args.batches * args.batch_size, args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    model = models.build_model(options["model"], checkpoint["num_classes"])
    model.load_state_dict(checkpoint["model"])
    model.to(device).to(memory_format=torch.channels_last)
    loader = evaluation_loader(images, args.workers, device, batch_size=args.batch_size)
    loss = partial(cross_entropy, model, loader)
    measured = command_line.measure_watched(loss, len(loader), model, regions, args)
    epoch = len(checkpoint["epochs"])
    kind = {"train": "training", "test": "held-out" if options["hold_out"] else "test"}[args.split]
    print(f"{args.run}: {options['model']} on {options['dataset']}, {epoch} of {options['epochs']} epochs")
    print(f"cross-entropy of {len(images)} {kind} images in {len(loader)} batches, without augmentation")
    counts = {"images": len(images), "batches": len(loader), "epoch": epoch}
    command_line.report(args, measured, "image", {**counts, "options": options})


def images_of(options: dict[str, Any], split: str, root: Path | None, download: bool = False) -> data.Images:
    """Return the images, ``train`` or ``test``, of the run with *options*, without augmentation.

    Raises:
        FileNotFoundError: the folder *root* does not have the data set.
    """
    of_the_run = {name: options[name] for name in ("label_noise", "hold_out", "seed")}
    loaded = data.load(options["dataset"], root, **of_the_run, augmentation="none", download=download)
    return getattr(loaded, split)


def at_random(images: data.Images, number: int, seed: int) -> Subset:
    """Return *number* of the *images*, drawn at random with *seed*, or all if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    return Subset(images, torch.randperm(len(images), generator=generator)[:number].tolist())


def cross_entropy(model: nn.Module, loader: DataLoader) -> Iterator[tuple[Tensor, int]]:
    """Yield the summed cross-entropy of each batch and its number of images."""
    device = next(model.parameters()).device
    for images, targets in loader:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        yield F.cross_entropy(model(images), targets, reduction="sum"), len(targets)
