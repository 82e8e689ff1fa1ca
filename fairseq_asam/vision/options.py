"""The options of a training run, and the paper's values for them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq_asam.sharpness.normalization import IDENTITY, NORMALIZATIONS
from fairseq_asam.sharpness.perturbation import validate

from .data import DATASETS
from .models import MODELS

OPTIMIZERS = ("sgd", "sam", "asam")
BATCH_NORM_STATISTICS = ("first", "both")
MIXED_PRECISION = ("no", "bf16", "fp16")

#: Section 5.2 of the paper. SGD trains for twice as many epochs, at the cost of as many gradients. Those of
#: ``digits`` are ours.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cifar10": {"epochs": 200, "rho": {"sam": 0.05, "asam": 0.5}},
    "cifar100": {"epochs": 200, "rho": {"sam": 0.1, "asam": 1.0}},
    "imagenet": {
        "epochs": 100,
        "rho": {"sam": 0.05, "asam": 1.0},
        "batch_size": 512,
        "lr": 0.2,
        "weight_decay": 1e-4,
        "m": 128,
        "workers": 8,
    },
    "digits": {"epochs": 10, "rho": {"sam": 0.05, "asam": 0.5}, "batch_size": 32, "workers": 0},
}
COMMON = {
    "batch_size": 128,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "m": None,
    "augmentation": "standard",
    "cutmix": False,
    "workers": 2,
}
#: Section 5.2: what PyramidNet-272 has instead on CIFAR.
PYRAMIDNET = {
    "epochs": 900,
    "rho": {"sam": 0.05, "asam": 1.0},
    "batch_size": 256,
    "lr": 0.05,
    "m": 32,
    "augmentation": "autoaugment",
    "cutmix": True,
}
#: Options that say where or how fast a run is made, but not what it computes.
PLACE = ("output", "data", "download", "workers")


@dataclass(frozen=True)
class TrainOptions:
    """Options of :func:`~fairseq_asam.vision.train.train`; None stands for the data set's default, which
    :meth:`resolved` puts in its place.

    Attributes:
        dataset, model: of ``DATASETS`` and ``MODELS``.
        optimizer: ``sgd``, ``sam`` or ``asam``; SGD with momentum is the base of all three.
        output: folder of the run.
        data: folder of the data set.
        download: let torchvision download what is missing there.
        rho, eta, p_norm, normalization, normalize_bias: of :class:`~fairseq_asam.Perturbation`.
        m: images that have an epsilon of their own (m-sharpness); 0: one epsilon for the whole batch.
        batch_norm_statistics: ``first``, those of the pass at w alone; ``both``, of the pass at w + epsilon
            too, as in the paper's code.
        batch_size: over all processes.
        epochs, lr, momentum, weight_decay, label_smoothing: of the training. The learning rate falls from
            *lr* along a cosine, by the epoch.
        label_noise: share of training labels replaced (Table 6).
        augmentation: ``none``, ``standard`` or ``autoaugment``.
        cutmix: mix images of a batch (CutMix, Yun et al. 2019).
        hold_out: evaluate on so many training images, not on the test set.
        seed: decides weights, order, augmentation and label noise.
        mixed_precision: ``no`` (float32), ``bf16`` or ``fp16``.
        workers: processes that load images, for each training process.
    """

    dataset: str
    model: str
    optimizer: str
    output: Path
    data: Path | None = None
    download: bool = False
    rho: float | None = None
    eta: float = 0.01
    p_norm: float = 2.0
    normalization: str | None = None
    normalize_bias: bool = False
    m: int | None = None
    batch_norm_statistics: str = "first"
    batch_size: int | None = None
    epochs: int | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    label_smoothing: float = 0.1
    label_noise: float = 0.0
    augmentation: str | None = None
    cutmix: bool | None = None
    hold_out: int = 0
    seed: int = 0
    mixed_precision: str = "no"
    workers: int | None = None

    def resolved(self) -> TrainOptions:
        """Return these options with defaults filled in, and checked.

        Raises:
            ValueError: in one sentence, the first value that cannot be.
        """
        _one_of("dataset", self.dataset, DATASETS)
        _one_of("model", self.model, MODELS)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        defaults = {**COMMON, **DEFAULTS[self.dataset]}
        if self.model == "pyramidnet272" and self.dataset.startswith("cifar"):
            defaults.update(PYRAMIDNET)
        if self.optimizer == "sgd":
            defaults.update(epochs=2 * defaults["epochs"], m=None)
        defaults["rho"] = defaults["rho"].get(self.optimizer, 0.0)
        defaults["normalization"] = "element-wise" if self.optimizer == "asam" else "none"
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        options = TrainOptions(**{**defaults, **given, "m": given.get("m", defaults["m"]) or None})
        options._check()
        return options

    def _check(self) -> None:
        _one_of("batch_norm_statistics", self.batch_norm_statistics, BATCH_NORM_STATISTICS)
        _one_of("mixed_precision", self.mixed_precision, MIXED_PRECISION)
        validate(rho=self.rho, eta=self.eta, p=self.p_norm, normalization=self.normalization)
        if self.optimizer == "sgd" and (self.rho or self.m):
            raise ValueError(
                "sgd has no epsilon, and hence neither rho nor m: choose sam or asam to use them"
            )
        if self.optimizer != "asam" and NORMALIZATIONS[self.normalization] is not IDENTITY:
            raise ValueError(
                f"{self.optimizer} has no normalization operator such as {self.normalization}: choose asam"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but it is a share: choose it in [0, 1)"
            )
        for name in ("batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if self.m is not None and self.m < 1:
            raise ValueError(f"m is {self.m}, but it must be at least 1, or 0 for one epsilon for the batch")

    def check_shares(self, processes: int) -> None:
        """Check that so many processes can share a batch.

        Raises:
            ValueError: in one sentence, if they cannot, or not in groups of m.
        """
        if self.batch_size % processes:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {processes} processes can't share: choose a multiple"
            )
        share = self.batch_size // processes
        if self.m is not None and share % self.m:
            raise ValueError(
                f"m is {self.m}, which does not divide the {share} images that a process has of a batch: "
                "choose a divisor"
            )

    def of_the_run(self) -> dict[str, Any]:
        """Return the options that decide what is computed, as JSON has them: all but :data:`PLACE`."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in PLACE}
        return {**options, "p_norm": "inf" if self.p_norm == math.inf else self.p_norm}


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but it must be one of {', '.join(choices)}")
