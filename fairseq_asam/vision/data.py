"""Data sets by name, with their augmentation, label noise and held-out images."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Union

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CIFAR10, CIFAR100, ImageNet
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.datasets.imagenet import META_FILE, load_meta_file
from torchvision.transforms import v2

DIGITS_IN_TEST = 600
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"  # of ImageNet, with its list of classes


@dataclass(frozen=True)
class Data:
    """The training and the test images. An item is (image, label): normalized float32 of 3 x H x W, and
    int."""

    train: View
    test: View
    num_classes: int


class LabelledImages(Protocol):
    """A data set as it was fetched. ``targets`` has the label of each image."""

    targets: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class DatasetSpec:
    """A data set, and the transforms of its images.

    Attributes:
        num_classes: labels are 0 to ``num_classes - 1``.
        fetch: returns the training and the test set, given a folder and whether to download.
        mean, std: of each channel of the training images, whose values are in [0, 1].
        augmentations: name -> transforms of training images, in this order.
        framing: transforms that bring images of other sets to one size.
    """

    num_classes: int
    fetch: Callable[[Path | None, bool], tuple[LabelledImages, LabelledImages]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentations: dict[str, list[v2.Transform]]
    framing: list[v2.Transform]


class Digits(Dataset):
    """The 1,797 handwritten digits of scikit-learn, enlarged from 8 x 8 to the shape of CIFAR, uint8. The
    test images are always the same :data:`DIGITS_IN_TEST`, in the proportions of the classes."""

    def __init__(self, train: bool):
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=DIGITS_IN_TEST, random_state=0, stratify=labels)
        images, labels = parts[0::2] if train else parts[1::2]
        images = torch.from_numpy(images * 255 / 16).view(-1, 1, 8, 8)
        images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
        self.images = images.round().to(torch.uint8).expand(-1, 3, -1, -1)
        self.targets = labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def _digits(root: Path | None, download: bool) -> tuple[LabelledImages, LabelledImages]:
    return Digits(train=True), Digits(train=False)


def _cifar(cifar: type[CIFAR10]) -> Callable[[Path | None, bool], tuple[LabelledImages, LabelledImages]]:
    def fetch(root: Path | None, download: bool) -> tuple[LabelledImages, LabelledImages]:
        if root is None:
            raise FileNotFoundError(f"{cifar.__name__} needs a folder: name one with --data")
        try:
            return tuple(cifar(str(root), train, download=download) for train in (True, False))
        except (RuntimeError, OSError) as error:
            remedy = f"the download failed ({error})" if download else "fetch it with --download"
            raise FileNotFoundError(
                f"'{root}' has no {cifar.__name__}, whole and unchanged, in '{cifar.base_folder}': {remedy}, "
                f"or unpack {cifar.url} there"
            ) from error

    return fetch


class ImageNetSplit(ImageNet):
    """The training or the validation images of ImageNet.

    The devkit's list of classes decides the labels, so that both splits have the same ones. Hidden files and
    folders, as Jupyter and macOS make them, are ignored.

    Args:
        root: folder of the archives, or of what torchvision has unpacked.
        split: ``train`` or ``val``.

    Raises:
        ValueError: there is a folder of another class, or none.
        FileNotFoundError: a class folder has no image.
        RuntimeError: an archive is damaged.
    """

    def __init__(self, root: Path, split: str):
        folder = os.path.join(os.path.expanduser(root), split)

        def is_image(path: str) -> bool:
            return path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in path[len(folder) :]

        super().__init__(str(root), split, loader=_read_image, is_valid_file=is_image)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(e.name for e in os.scandir(directory) if e.is_dir() and not e.name.startswith("."))
        labels = {name: label for label, name in enumerate(sorted(load_meta_file(Path(directory).parent)[0]))}
        others = [name for name in names if name not in labels]
        if others:
            raise ValueError(
                f"'{directory}' has {_some(others)}, no class of ImageNet's devkit: move it away"
            )
        if not names:
            raise ValueError(
                f"'{directory}' has no class folders: move each image into the folder of its class, such as "
                f"{_some(list(labels))}"
            )
        return names, {name: labels[name] for name in names}


def _imagenet(root: Path | None, download: bool) -> tuple[LabelledImages, LabelledImages]:
    unpacked = {
        _DEVKIT: META_FILE,
        "ILSVRC2012_img_train.tar": "train",
        "ILSVRC2012_img_val.tar": "val",
    }
    if root is None:
        raise FileNotFoundError(f"ImageNet needs a folder: name the one of {', '.join(unpacked)} with --data")
    missing = [a for a, folder in unpacked.items() if not ((root / a).exists() or (root / folder).exists())]
    if missing:
        raise FileNotFoundError(
            f"'{root}' has only a part of ImageNet, or nothing: get {', '.join(missing)} from image-net.org, "
            "which wants you to register; what you put there is unpacked at the first use"
        )
    _check_meta_file(root)
    train, val = (_imagenet_split(root, split) for split in ("train", "val"))
    for one, other in ((train, val), (val, train)):
        lacking = [name for name in other.wnids if name not in one.wnid_to_idx]
        if lacking:
            raise ValueError(
                f"'{root / one.split}' lacks the class folder {_some(lacking)}, which '{root / other.split}' "
                "has: give both the same classes"
            )
    return train, val


def _imagenet_split(root: Path, split: str) -> ImageNetSplit:
    try:
        return ImageNetSplit(root, split)
    except (RuntimeError, OSError) as error:  # it may name a thousand empty folders
        message = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise FileNotFoundError(f"'{root / split}' cannot be read: {message}") from error


def _check_meta_file(root: Path) -> None:
    """Raise ValueError if torchvision's file of ImageNet's classes is there and cannot be read."""
    try:
        if (root / META_FILE).exists():
            load_meta_file(root)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"'{root / META_FILE}' is damaged ({error}): remove it, and put {_DEVKIT} there, from "
            "which it is made anew"
        ) from error


def _read_image(path: str) -> Any:
    try:
        return default_loader(path)
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"the image '{path}' cannot be read ({error}): fetch it again, or remove it") from error


def _some(names: list[str]) -> str:
    """Return the first of *names*, and how many others there are."""
    return f"'{names[0]}'" if len(names) == 1 else f"'{names[0]}' and {len(names) - 1} more"


def _cifar_spec(cifar: type[CIFAR10], num_classes: int, mean: tuple, std: tuple) -> DatasetSpec:
    standard = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    autoaugment = [*standard, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]
    augmentations = {"none": [], "standard": standard, "autoaugment": autoaugment}
    return DatasetSpec(num_classes, _cifar(cifar), mean, std, augmentations, framing=[])


_IMAGENET_FRAMING = [v2.Resize(256), v2.CenterCrop(224)]
_IMAGENET_STANDARD = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]

#: The data sets by name. Each has the augmentations ``none`` and ``standard`` (Section 5.2).
DATASETS: dict[str, DatasetSpec] = {
    "cifar10": _cifar_spec(CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _cifar_spec(CIFAR100, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": DatasetSpec(
        num_classes=1000,
        fetch=_imagenet,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augmentations={
            "none": _IMAGENET_FRAMING,
            "standard": _IMAGENET_STANDARD,
            "autoaugment": [*_IMAGENET_STANDARD, v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)],
        },
        framing=_IMAGENET_FRAMING,
    ),
    "digits": DatasetSpec(
        num_classes=10,
        fetch=_digits,
        mean=(0.3054,) * 3,
        std=(0.3236,) * 3,
        # No flip: the mirror image of a digit is no digit.
        augmentations={"none": [], "standard": [v2.RandomCrop(32, padding=4)]},
        framing=[],
    ),
}


class View(Dataset):
    """The images *numbers* of a data set, with other labels and a transform."""

    def __init__(
        self, images: LabelledImages, numbers: list[int], labels: list[int], transform: v2.Transform
    ):
        self.images, self.numbers, self.labels, self.transform = images, numbers, labels, transform

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, _ = self.images[self.numbers[index]]
        return self.transform(image), self.labels[index]


#: The data sets that a loader takes.
Images = Union[View, Subset]


def load(
    name: str,
    root: Path | None = None,
    *,
    label_noise: float = 0.0,
    augmentation: str = "standard",
    hold_out: int = 0,
    seed: int = 0,
    download: bool = False,
) -> Data:
    """Return the training images, augmented and with label noise, and the test images as they are.

    Args:
        name: one of :data:`DATASETS`.
        root: folder of the data; ``digits`` needs none.
        label_noise: share of the training images, in [0, 1), that get a wrong label, drawn uniformly from the
            other classes (Section 5.4). This is the symmetric noise of van Rooyen et al. (2015), who flip a
            binary label with that probability.
        augmentation: ``none``, ``standard`` or ``autoaugment``, which ``digits`` does not have.
        hold_out: number of training images to use as test images instead of the test set, so that rho can be
            chosen without it. They have the proportions of the classes and no label noise.
        seed: decides label noise and held-out images.
        download: fetch CIFAR if it is missing.

    Raises:
        ValueError: a value is not allowed, or the two splits have other classes.
        FileNotFoundError: the data is missing or damaged.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set '{name}': choose one of {', '.join(DATASETS)}")
    spec = DATASETS[name]
    if augmentation not in spec.augmentations:
        choices = ", ".join(spec.augmentations)
        raise ValueError(f"{name} has no augmentation '{augmentation}': choose one of {choices}")
    if not 0 <= label_noise < 1:
        raise ValueError(
            f"label_noise is {label_noise}, but it is a share of the labels: choose it in [0, 1)"
        )
    train, test = spec.fetch(root, download)
    numbers, labels = list(range(len(train))), list(train.targets)
    if hold_out:
        at_most = len(train) - spec.num_classes
        if not spec.num_classes <= hold_out <= at_most:
            raise ValueError(
                f"hold_out is {hold_out}, but {name} can hold out 0 or {spec.num_classes} to {at_most} images"
            )
        numbers, held_out = train_test_split(numbers, test_size=hold_out, random_state=seed, stratify=labels)
        test, test_numbers = train, held_out
    else:
        test_numbers = list(range(len(test)))
    test_labels = [test.targets[number] for number in test_numbers]
    labels = with_noise([labels[number] for number in numbers], label_noise, spec.num_classes, seed)
    return Data(
        View(train, numbers, labels, _transform(spec, spec.augmentations[augmentation])),
        View(test, test_numbers, test_labels, _transform(spec, spec.framing)),
        spec.num_classes,
    )


def with_noise(labels: list[int], share: float, num_classes: int, seed: int) -> list[int]:
    """Return *labels* with wrong ones in place of a *share* of them, see :func:`load`."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.tensor(labels)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noisy[chosen] += torch.randint(1, num_classes, (len(chosen),), generator=generator)
    return (noisy % num_classes).tolist()


def _transform(spec: DatasetSpec, steps: list[v2.Transform]) -> v2.Transform:
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([*steps, *to_float, v2.Normalize(spec.mean, spec.std), v2.ToPureTensor()])
