"""Which images an update sees: decided by the seed, the epoch and the batch size alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

if TYPE_CHECKING:
    from .data import Images


def seed_of(*numbers: int) -> int:
    """Return a seed for a generator, in [0, 2^32), for this combination of *numbers* >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Batches:
    """The training batches of one process, as lists of (image number, seed of its augmentation).

    The images of an epoch are shuffled; batch k is the k-th ``batch_size`` of them, and process r of w gets
    the r-th w-th of it. Hence several processes see the batches that one would, and any m images that make
    an epsilon are the same. The last, incomplete batch is dropped, another remainder in every epoch.

    Attributes:
        epoch: the epoch that the next iteration is to be, from 1.
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
    """A data set whose random augmentation, which is to draw from torch's generator, is decided by a seed:
    its items are those of *dataset*, by (number, seed)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        number, seed = draw
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return self.dataset[number]


def training_loader(dataset: Images, batches: Batches, workers: int, device: torch.device) -> DataLoader:
    """Return a loader of *batches*, whose augmentation runs in so many worker processes."""
    return _loader(Augmented(dataset), workers, device, batch_sampler=batches)


def evaluation_loader(
    dataset: Images,
    workers: int,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
    batch_size: int = 256,
) -> DataLoader:
    """Return a loader of every *processes*-th image from *process* on: all of them, over all processes."""
    share = Subset(dataset, range(process, len(dataset), processes))
    return _loader(share, workers, device, batch_size=batch_size)


def _loader(dataset: Dataset, workers: int, device: torch.device, **options: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own, so that it leaves the model's random numbers alone
        **options,
    )
