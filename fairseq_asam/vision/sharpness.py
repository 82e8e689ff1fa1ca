"""Sharpness and adaptive sharpness of an image run, as a table and JSON.

The loss is plain cross-entropy, without the label smoothing of training, in nats per image: of images without
augmentation, with the labels trained on, in float32 and in evaluation mode, where batch normalization has its
running statistics. Network, data set, label noise and held-out images are the run's.
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

from fairseq_asam.measuring.command_line import (
    add_batch_arguments,
    add_region_arguments,
    measure_watched,
    regions_of,
    report,
)

from . import data, models
from .batches import evaluation_loader
from .run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of :func:`measure_run`."""
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run, which may go on meanwhile")
    add("--split", choices=("train", "test"), default="train", help="test: what the run evaluates on")
    add("--data", type=Path, metavar="ROOT", help="folder of the data set (not needed for digits)")
    add("--download", action="store_true", help="let torchvision download what is missing there")
    add("--workers", type=int, default=0, help="processes that load images")
    add("--batch-size", type=int, default=256, help="images that go through the network together")
    add_batch_arguments(parser)
    add_region_arguments(parser)


def measure_run(args: argparse.Namespace) -> None:
    """Measure the last checkpoint of a run, print the table and write the JSON.

    Raises:
        ValueError, FileNotFoundError: in one sentence, what cannot be; if possible, before anything is
            loaded.
    """
    regions = regions_of(args)
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
    measured = measure_watched(partial(cross_entropy, model, loader), len(loader), model, regions, args)
    epoch = len(checkpoint["epochs"])
    kind = {"train": "training", "test": "held-out" if options["hold_out"] else "test"}[args.split]
    print(f"{args.run}: {options['model']} on {options['dataset']}, {epoch} of {options['epochs']} epochs")
    print(f"cross-entropy of {len(images)} {kind} images in {len(loader)} batches, without augmentation")
    counts = {"images": len(images), "batches": len(loader), "epoch": epoch}
    report(args, measured, "image", {**counts, "options": options})


def images_of(options: dict[str, Any], split: str, root: Path | None, download: bool = False) -> data.Images:
    """Return the images, ``train`` or ``test``, of the run with *options*, without augmentation.

    Raises:
        FileNotFoundError: the folder *root* has not the data set.
    """
    loaded = data.load(
        options["dataset"],
        root,
        label_noise=options["label_noise"],
        augmentation="none",
        hold_out=options["hold_out"],
        seed=options["seed"],
        download=download,
    )
    return getattr(loaded, split)


def at_random(images: data.Images, number: int, seed: int) -> Subset:
    """Return so many of *images*, drawn with *seed*; all, in another order, if there are no more."""
    generator = torch.Generator().manual_seed(seed)
    return Subset(images, torch.randperm(len(images), generator=generator)[:number].tolist())


def cross_entropy(model: nn.Module, loader: DataLoader) -> Iterator[tuple[Tensor, int]]:
    """Yield the terms of the mean cross-entropy, as :data:`~fairseq_asam.sharpness.measure.Loss` has them."""
    device = next(model.parameters()).device
    for images, targets in loader:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        yield F.cross_entropy(model(images), targets, reduction="sum"), len(targets)
