"""The images of each update. Seed, epoch and batch size alone decide them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

if TYPE_CHECKING:
    from .data import Images


def seed_of(*numbers: int) -> int:
    """Return a seed in [0, 2^32) for a generator, another for each combination of *numbers* >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Batches:
    """The training batches of one process, as lists of (image number, seed of its augmentation).

    Each epoch shuffles the images, cuts them into batches and drops a last one that is incomplete. Each
    process gets an equal, contiguous part of a batch. Several processes thus see the batches that one sees,
    in the same groups of m images.

    Attributes:
        epoch: number of the epoch that the next iteration gives, from 1.
    """

    def __init__(self, images: int, batch_size: int, seed: int, process: int = 0, processes: int = 1):
        self.images, self.batch_size, self.seed, self.epoch = images, batch_size, seed, 1
        share = batch_size // processes
        self._share = slice(process * share, (process + 1) * share)

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator).tolist()
        seeds = torch.randint(2**32, (self.images,), generator=generator).tolist()
        draws = list(zip(order, seeds))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield draws[start : start + self.batch_size][self._share]


class Augmented(Dataset):
    """The items of *dataset* by (number, seed). The seed decides what augmentation draws from torch's
    generator."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        number, seed = draw
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return self.dataset[number]


def training_loader(dataset: Images, batches: Batches, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of *batches* with *workers* processes that augment images."""
    return _loader(Augmented(dataset), workers, device, batch_sampler=batches)


def evaluation_loader(
    dataset: Images,
    workers: int,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
    batch_size: int = 256,
) -> DataLoader:
    """Return a loader of every *processes*-th image from *process* on."""
    share = Subset(dataset, range(process, len(dataset), processes))
    return _loader(share, workers, device, batch_size=batch_size)


def _loader(dataset: Dataset, workers: int, device: torch.device, **options: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # with the global one, it would change the model's random numbers
        **options,
    )
