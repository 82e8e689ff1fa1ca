"""The options of a training run, and the paper's values for them.

:class:`TrainOptions` is the only place that knows an option: its name, type, default, choices and help.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, get_args, get_type_hints

from fairseq_asam.sharpness.directions import DIRECTIONS, meanings
from fairseq_asam.sharpness.late_start import validate_start
from fairseq_asam.sharpness.normalization import IDENTITY, NORMALIZATIONS
from fairseq_asam.sharpness.perturbation import validate

from .data import DATASETS
from .models import MODELS

# No "from __future__ import annotations" here: the command line needs types, not their names.

#: The values of Section 5.2 of the paper, and ours for ``digits``. The row of the data set replaces values of
#: the row ``""``, and on CIFAR the row of ``pyramidnet272`` replaces values of both. SGD has no rho, operator
#: and m. It trains for twice as many epochs, since its updates cost half as many gradients.
DEFAULTS: dict[str, dict[str, Any]] = {
    "": {
        "normalization": {"sam": "none", "asam": "element-wise"},
        "batch_size": 128,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "m": 0,
        "augmentation": "standard",
        "cutmix": False,
        "workers": 2,
    },
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
    "pyramidnet272": {
        "epochs": 900,
        "rho": {"sam": 0.05, "asam": 1.0},
        "batch_size": 256,
        "lr": 0.05,
        "m": 32,
        "augmentation": "autoaugment",
        "cutmix": True,
    },
}
#: Options that say where a run is made or how fast, but not what it computes.
PLACE = ("output", "data", "download", "workers")


def _option(help: str, default: Any = dataclasses.MISSING, **of_argparse: Any) -> Any:
    """Return a field that :func:`add_options` makes an option of the command line.

    Args:
        help: text of ``--help``, without the default.
        default: ``None`` stands for the value in :data:`DEFAULTS`. Without a default, the option is required.
        of_argparse: more arguments of ``add_argument``; ``flags``, if they are not the field's name;
            ``heading``, above this option and the following ones in ``--help``.
    """
    return field(default=default, metadata={"help": help, **of_argparse})


@dataclass(frozen=True)
class TrainOptions:
    """The options of :func:`~fairseq_asam.vision.train.train`, explained by
    ``python -m fairseq_asam.vision train --help``. ``None`` stands for a value in :data:`DEFAULTS`."""

    dataset: str = _option("images and labels to learn", choices=DATASETS)
    model: str = _option("network to train", choices=MODELS)
    optimizer: str = _option("SGD with momentum, alone or within SAM or ASAM", choices=("sgd", "sam", "asam"))
    output: Path = _option("folder of the run", metavar="RUN")
    data: Optional[Path] = _option("folder of the data; digits needs none", None, metavar="ROOT")
    download: bool = _option("let torchvision download what is missing there", False)
    workers: Optional[int] = _option("processes that load images", None)

    rho: Optional[float] = _option(
        "radius of the maximization region", None, heading="the maximization region (sam and asam)"
    )
    eta: float = _option("added to the normalization operator", 0.01)
    p_norm: float = _option("order of the norm that bounds the region, 1 < p <= inf", 2.0)
    normalization: Optional[str] = _option("normalization operator T_w", None, choices=NORMALIZATIONS)
    normalize_bias: bool = _option("normalize biases like other weights (Figure 4)", False)
    m: Optional[int] = _option(  # torchrun takes --m for an option of its own
        "images that share an epsilon (m-sharpness); 0: all",
        None,
        flags=("--m", "--m-sharpness"),
        metavar="M",
    )
    ascent_direction: str = _option(
        f"what epsilon is made of; {meanings()}",
        "gradient",
        choices=DIRECTIONS,
    )
    ascent_from: float = _option(
        "number of the first sharpness-aware update, or, below 1, a share of all updates; the updates before "
        "are plain steps of sgd (late start)",
        0.0,
    )
    batch_norm_statistics: str = _option(
        "passes that update the statistics of batch normalization: the first, at w, or both, as in the "
        "paper's code",
        "first",
        choices=("first", "both"),
    )

    batch_size: Optional[int] = _option(
        "images of an update, over all processes", None, heading="the training"
    )
    epochs: Optional[int] = _option("passes over the training images; sgd makes twice as many", None)
    lr: Optional[float] = _option("first learning rate; it falls along a cosine, by the epoch", None)
    momentum: float = _option("momentum of SGD", 0.9)
    weight_decay: Optional[float] = _option("coefficient of weight decay (lambda in Algorithm 1)", None)
    label_smoothing: float = _option("share of a label that all classes get", 0.1)
    label_noise: float = _option("share of training labels to replace (Table 6)", 0.0)
    augmentation: Optional[str] = _option(
        "how to change training images at random", None, choices=("none", "standard", "autoaugment")
    )
    cutmix: Optional[bool] = _option("mix the images of a batch (Yun et al. 2019)", None)
    hold_out: int = _option(
        "number of training images to hold out and to evaluate on; 0: evaluate on the test set", 0
    )
    seed: int = _option("decides weights, order, augmentation and label noise", 0)
    mixed_precision: str = _option(
        "precision of the passes; no: float32", "no", choices=("no", "bf16", "fp16")
    )

    def resolved(self) -> "TrainOptions":
        """Return these options with values of :data:`DEFAULTS` in place of ``None``.

        Raises:
            ValueError: a value is not allowed.
        """
        for option in dataclasses.fields(self):
            value, choices = getattr(self, option.name), option.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise ValueError(f"{option.name} is {value!r}, but it must be one of {', '.join(choices)}")
        defaults = {**DEFAULTS[""], **DEFAULTS[self.dataset]}
        if self.model == "pyramidnet272" and self.dataset.startswith("cifar"):
            defaults.update(DEFAULTS["pyramidnet272"])
        if self.optimizer == "sgd":
            defaults.update(rho=0.0, normalization="none", m=0, epochs=2 * defaults["epochs"])
        else:
            defaults.update({name: defaults[name][self.optimizer] for name in ("rho", "normalization")})
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        options = {**defaults, **given}
        options["m"] = options["m"] or None
        resolved = TrainOptions(**options)
        resolved._check()
        return resolved

    def _check(self) -> None:
        validate(rho=self.rho, eta=self.eta, p=self.p_norm)
        validate_start(self.ascent_from)
        direction, default = DIRECTIONS[self.ascent_direction], type(self).ascent_direction
        of_epsilon = self.rho or self.m or self.ascent_from or self.ascent_direction != default
        if self.optimizer == "sgd" and of_epsilon:
            raise ValueError(
                "sgd has no epsilon and takes no rho, m, ascent_from or ascent_direction: choose sam or asam "
                "to use them"
            )
        if self.m and not direction.needs_pass_at_w:
            raise ValueError(
                f"m is {self.m}, but ascent_direction {self.ascent_direction} makes one epsilon for the "
                f"batch: set m to 0, or ascend by {default}"
            )
        if direction.needs_optimizer and not self.momentum:
            raise ValueError(
                f"momentum is {self.momentum}, but ascent_direction {self.ascent_direction} is made of it: "
                f"choose one above 0, or ascend by {default}"
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
        """Raise ValueError if so many *processes* cannot share a batch, in groups of m images."""
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
        """Return the options that decide what is computed (all but :data:`PLACE`), ready for JSON."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k not in PLACE}
        return {**options, "p_norm": "inf" if self.p_norm == math.inf else self.p_norm}


def add_options(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Add the fields *names* of :class:`TrainOptions`, or all of them, to *parser*. *changes* replace
    arguments of ``add_argument``."""
    group: Any = parser
    types = get_type_hints(TrainOptions)
    for option in dataclasses.fields(TrainOptions):
        if names and option.name not in names:
            continue
        keywords = {"default": option.default, **option.metadata, **changes}
        heading = keywords.pop("heading", None)
        if heading and not names:
            group = parser.add_argument_group(heading)
        flags = keywords.pop("flags", [f"--{option.name.replace('_', '-')}"])
        kind, default = types[option.name], keywords["default"]
        if kind is bool:
            keywords["action"] = "store_true"
        elif kind == Optional[bool]:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = get_args(kind)[0] if get_args(kind) else kind
        if default is dataclasses.MISSING:
            keywords.update(default=None, required=True)
        elif default is not False:
            keywords["help"] += _stated_default(option.name, default)
        group.add_argument(*flags, **keywords)


def _stated_default(name: str, default: Any) -> str:
    """Return the end of the help of the option *name*: its default, or those in :data:`DEFAULTS`."""
    if default is None:
        rows = {row: options[name] for row, options in DEFAULTS.items() if name in options}
        default = "; ".join(f"{row}: {_words(value)}".removeprefix(": ") for row, value in rows.items())
    return f" (default: {default})" if default != "" else ""


def _words(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
