"""Which images, augmented how, an update sees."""

import pytest
import torch
from torch.utils.data import Dataset

from fairseq_asam.vision.batches import Batches, evaluation_loader, training_loader

CPU = torch.device("cpu")


class Noise(Dataset):
    """Item i is i plus noise of torch's generator in [0, 1), and i."""

    def __len__(self):
        return 50

    def __getitem__(self, number):
        return number + torch.rand(()), number


def epoch(number, *share, seed=0):
    batches = Batches(50, 12, seed, *share)
    batches.epoch = number
    return list(batches)


def test_an_epoch_has_every_image_once_but_for_the_incomplete_batch():
    batches = epoch(1)
    assert [len(batch) for batch in batches] == [12, 12, 12, 12]
    numbers = [number for batch in batches for number, _ in batch]
    assert len(set(numbers)) == 48 and set(numbers) <= set(range(50)) and numbers != sorted(numbers)


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    assert epoch(3) == epoch(3)
    assert len({str(epoch(n, seed=s)) for n in (1, 2) for s in (0, 1)}) == 4
    seeds = [seed for batch in epoch(1) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_processes_share_the_batches_of_one():
    for whole, *shares in zip(epoch(2), epoch(2, 0, 3), epoch(2, 1, 3), epoch(2, 2, 3)):
        assert [len(share) for share in shares] == [4, 4, 4]
        assert [*shares[0], *shares[1], *shares[2]] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_is_the_same_for_any_workers_and_leaves_other_random_numbers_alone(workers):
    expected = None
    for _ in range(2):
        torch.manual_seed(5)
        loader = training_loader(Noise(), Batches(50, 12, 0), workers, CPU)
        images = torch.cat([images for images, _ in loader])
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(5))
        expected = images if expected is None else expected
        assert torch.equal(images, expected)
    one = torch.cat([images for images, _ in training_loader(Noise(), Batches(50, 12, 0), 0, CPU)])
    assert torch.equal(one, expected)
    assert len(set((one - one.floor()).tolist())) == 48


def test_processes_evaluate_every_image_once():
    loaders = [evaluation_loader(Noise(), 0, CPU, process, 3) for process in range(3)]
    numbers = [number for loader in loaders for _, batch in loader for number in batch.tolist()]
    assert sorted(numbers) == list(range(50))
