"""Trains and measures the models of Table 1 and Figure 2 of the paper, and ranks them (Section 3).

    python -m recipes.paper.rank_models OUT --jobs 2                         # minutes on a CPU
    python -m recipes.paper.rank_models OUT --dataset cifar10 --data data    # at the paper's size

There is a model for each combination of mini-batch size, learning rate, weight decay and dropout rate. All
are trained with SGD, without augmentation or label smoothing, until the loss over the training images has
fallen to one value, the stopping criterion of Jiang et al. (2019). A model that doesn't reach it is counted
and left out.

OUT/models gets a file for each model that is finished; stopped at any time, the same command goes on with the
others. OUT/models.json, rank.md, rank.json and rank.png are the results.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fairseq_asam import Region, measure
from fairseq_asam.files import write_json
from fairseq_asam.vision import data
from fairseq_asam.vision.batches import Batches, evaluation_loader, seed_of
from fairseq_asam.vision.models import WITH_DROPOUT, build_model
from recipes.paper.rank import rank_statistics, table, write

#: Name in Table 1 -> option.
HYPER_PARAMETERS = {
    "mini-batch size": "batch_size",
    "learning rate": "lr",
    "weight decay": "weight_decay",
    "dropout rate": "dropout",
}
MEASURES = [f"{name} (p = {p})" for p in (2, "∞") for name in ("sharpness", "adaptive sharpness")]
#: Values of the grid. Section 3 names the hyper-parameters; the values are ours.
BATCH_SIZES, LEARNING_RATES = [32, 64, 128], [0.03, 0.1, 0.3]
#: What is not given on the command line and depends on the data set.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "mlp",
        "checks": 5,
        "weight_decay": [1e-4, 3e-4, 1e-3],
        "dropout": [0.0, 0.15, 0.3],
    },
    "cifar10": {
        "model": "wrn28_2",
        "checks": 1,
        "weight_decay": [5e-6, 5e-5, 5e-4],
        "dropout": [0.0, 0.125, 0.25],
    },
}
#: The rows of Table 1, a column for each of MEASURES.
TABLE_1 = {
    "tau": (0.174, 0.636, 0.257, 0.616),
    "mini-batch size": (0.667, 0.696, 0.777, 0.817),
    "learning rate": (0.563, 0.577, 0.797, 0.806),
    "weight decay": (-0.297, 0.534, -0.469, 0.656),
    "dropout rate": (0.102, -0.092, 0.161, 0.225),
    "average": (0.259, 0.429, 0.316, 0.626),
}
MOMENTUM = 0.9
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Settings:
    """What all models of a grid share.

    Attributes:
        dataset, model: of :mod:`fairseq_asam.vision`.
        stop_loss: the stopping criterion: the cross-entropy over the training images in evaluation mode.
        checks: how often in an epoch it is looked at.
        epochs: a model that has not reached it after so many has failed; over them, the learning rate falls
            along a cosine.
        seed: decides the first weights, the order of images and the dropout masks.
        rho, adaptive_rho: radii of the regions of sharpness and adaptive sharpness for p = 2. Those for
            p = inf are the largest cubes in them, of this radius over the square root of the number of
            weights.
        steps: of projected gradient ascent; 1: the epsilon of training.
        images: the first so many training images are those on which sharpness is measured.
    """

    dataset: str
    model: str
    stop_loss: float
    checks: int
    epochs: int
    seed: int
    rho: float
    adaptive_rho: float
    steps: int
    images: int

    def __post_init__(self):
        for name, least in (("checks", 1), ("epochs", 1), ("steps", 1), ("images", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, but it must be at least {least}")
        if not self.stop_loss > 0:
            raise ValueError(f"--stop-loss is {self.stop_loss}, but it is a loss to reach: choose it above 0")
        self.regions(weights=1)

    def regions(self, weights: int) -> list[Region]:
        """Return the region of each of :data:`MEASURES` for a network with so many *weights*."""
        return [
            region
            for p, shrink in ((2.0, 1.0), (math.inf, math.sqrt(weights)))
            for region in (
                Region(self.rho / shrink, p=p, normalization="none"),
                Region(self.adaptive_rho / shrink, p=p),
            )
        ]


@dataclass(frozen=True)
class Images:
    """A data set in memory: N x 3 x H x W and N, on the device."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int


@functools.lru_cache(maxsize=1)
def load(dataset: str, root: Path | None) -> Images:
    loaded = data.load(dataset, root, augmentation="none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def whole(images: data.Images) -> tuple[Tensor, Tensor]:
        batches = zip(*evaluation_loader(images, 0, device))
        inputs, labels = (torch.cat(parts).to(device) for parts in batches)
        return inputs, labels

    return Images(whole(loaded.train), whole(loaded.test), loaded.num_classes)


def mean_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield the terms of the mean cross-entropy, as :data:`~fairseq_asam.sharpness.measure.Loss` has them."""
    for some, of_some in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH)):
        yield F.cross_entropy(network(some), of_some, reduction="sum"), len(of_some)


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the cross-entropy and the accuracy in evaluation mode; the network is then in training mode."""
    network.eval()
    outputs = torch.cat([network(some) for some in images.split(EVALUATION_BATCH)])
    network.train()
    accuracy = (outputs.argmax(1) == labels).double().mean()
    return F.cross_entropy(outputs, labels).item(), accuracy.item()


@dataclass(frozen=True)
class Model:
    """A model of the grid, and the *file* that says what was measured."""

    file: Path
    root: Path | None
    settings: Settings
    batch_size: int
    lr: float
    weight_decay: float
    dropout: float

    def hyper_parameters(self) -> dict[str, float]:
        return {name: getattr(self, option) for name, option in HYPER_PARAMETERS.items()}

    def finished(self) -> dict[str, Any] | None:
        """Return what the file says, or ``None`` before it is there.

        Raises:
            ValueError: it is of other settings, or unreadable.
        """
        if not self.file.exists():
            return None
        try:
            found = json.loads(self.file.read_text("utf-8"))
            settings = found["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"'{self.file}' cannot be read: delete it to make this model anew") from None
        for name, value in asdict(self.settings).items():
            if settings.get(name) != value:
                raise ValueError(
                    f"'{self.file}' was made with {name} {settings.get(name)}, not {value}: "
                    "choose another OUT"
                )
        return found

    def make(self) -> None:
        """Train the model, measure it if it reached the stopping criterion, and write the file."""
        begin = time.perf_counter()
        images = load(self.settings.dataset, self.root)
        network, epochs, reached = self._train(*images.train, images.num_classes)
        found: dict[str, Any] = {"hyper_parameters": self.hyper_parameters(), "reached": reached}
        if reached:
            train_loss, train_accuracy = evaluate(network, *images.train)
            test_loss, test_accuracy = evaluate(network, *images.test)
            found["generalization_gap"] = test_loss - train_loss
            found["measures"] = self._measures(network, *images.train)
            found.update(train_loss=train_loss, train_accuracy=train_accuracy)
            found.update(test_loss=test_loss, test_accuracy=test_accuracy)
        found.update(epochs=epochs, seconds=time.perf_counter() - begin, hardware=_hardware())
        write_json(self.file, {**found, "settings": asdict(self.settings)})

    def _train(self, images: Tensor, labels: Tensor, classes: int) -> tuple[nn.Module, float, bool]:
        """Return the network, after how many epochs it was, and whether it reached the criterion."""
        settings = self.settings
        torch.manual_seed(seed_of(settings.seed))
        torch.backends.cudnn.deterministic = True
        network = build_model(settings.model, classes, self.dropout).to(images.device)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=self.lr, momentum=MOMENTUM, weight_decay=self.weight_decay
        )
        batches = Batches(len(images), self.batch_size, settings.seed)
        interval = max(1, len(batches) // settings.checks)
        for epoch in range(settings.epochs):
            batches.epoch = epoch + 1
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
            for count, draws in enumerate(batches, start=1):
                numbers = torch.tensor([number for number, _ in draws], device=images.device)
                optimizer.zero_grad()
                F.cross_entropy(network(images[numbers]), labels[numbers]).backward()
                optimizer.step()
                if count % interval == 0:
                    loss, _ = evaluate(network, images, labels)
                    if loss <= settings.stop_loss or not math.isfinite(loss):
                        return network, epoch + count / len(batches), math.isfinite(loss)
        return network, settings.epochs, False

    def _measures(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
        some = images[: self.settings.images], labels[: self.settings.images]
        regions = self.settings.regions(sum(weights.numel() for weights in network.parameters()))
        found = measure(lambda: mean_loss(network, *some), network, regions, self.settings.steps)
        return {name: sharpness.value for name, sharpness in zip(MEASURES, found)}


def main() -> None:
    args = _arguments()
    try:
        models = grid(args)
        images = data.load(args.dataset, args.data, download=args.download).train  # once, for all processes
        if len(images) < max(args.batch_size):
            raise ValueError(f"--batch-size is {max(args.batch_size)}, but there are {len(images)} images")
        make(models, args.jobs)
        found = [model.finished() for model in models]
        ranked = [each for each in found if each["reached"]]
        if len(ranked) < 2:
            raise ValueError(
                f"{len(ranked)} of {len(found)} models reached the training loss {args.stop_loss:g}, too few "
                "to rank: choose a larger --stop-loss or more --epochs, and another OUT"
            )
        statistics = rank_statistics(ranked)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"rank_models: {error}")
    lines = [*table({**statistics, **table_1()}), "", summary(models[0].settings, found, args)]
    write_json(args.out / "models.json", ranked)
    write(args.out, ranked, statistics, lines)
    print("\n".join(lines))


def grid(args: argparse.Namespace) -> list[Model]:
    """Return the models of the grid.

    Raises:
        ValueError: in one sentence, a value that cannot be.
    """
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}, but it must be at least 1")
    for option, least in (("batch_size", 2), ("lr", 0.0), ("weight_decay", 0.0), ("dropout", 0.0)):
        for value in getattr(args, option):
            if not least <= value < (1.0 if option == "dropout" else math.inf):
                flag = option.replace("_", "-")
                upper = " and below 1" if option == "dropout" else ""
                raise ValueError(f"--{flag} has the value {value}, but it must be at least {least:g}{upper}")
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    models = []
    for values in itertools.product(*(getattr(args, option) for option in HYPER_PARAMETERS.values())):
        options = dict(zip(HYPER_PARAMETERS.values(), values))
        name = "-".join(f"{option}-{value:g}" for option, value in options.items())
        models.append(Model(args.out / "models" / f"{name}.json", args.data, settings, **options))
    return models


def make(models: list[Model], jobs: int) -> None:
    """Make those of *models* that are not finished, so many at a time."""
    waiting = [model for model in models if model.finished() is None]
    if not waiting:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        made = as_completed([pool.submit(model.make) for model in waiting])
        done = len(models) - len(waiting)
        for future in tqdm(made, total=len(models), initial=done, desc="models", unit="model"):
            future.result()
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on with the models that are not finished.")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def table_1() -> dict[str, dict[str, Any]]:
    """Return the paper's Table 1 as :func:`~recipes.paper.rank.rank_statistics` would."""
    columns = zip(MEASURES, zip(*TABLE_1.values()))
    of_each = {f"paper: {measure}": dict(zip(TABLE_1, values)) for measure, values in columns}
    return {
        measure: {
            "tau": values["tau"],
            "granulated": {name: values[name] for name in HYPER_PARAMETERS},
            "average": values["average"],
        }
        for measure, values in of_each.items()
    }


def summary(settings: Settings, found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return what was compared, in sentences."""
    ranked = [each for each in found if each["reached"]]
    losses, gaps = ([each[key] for each in ranked] for key in ("train_loss", "generalization_gap"))
    values = (f"{name} {getattr(args, option)}" for name, option in HYPER_PARAMETERS.items())
    minutes = sum(each["seconds"] for each in found) / 60
    return (
        f"{len(ranked)} of {len(found)} models reached a training loss of {settings.stop_loss:g} within "
        f"{settings.epochs} epochs (it was then {min(losses):.4f} to {max(losses):.4f}); the others are left "
        f"out. Data set {settings.dataset}, model {settings.model}, seed {settings.seed}; "
        f"{', '.join(values)}. The generalization gap, test loss - training loss, is {min(gaps):.4f} to "
        f"{max(gaps):.4f}. Sharpness: rho = {settings.rho:g}, adaptive {settings.adaptive_rho:g}, for p = "
        f"inf divided by the square root of the number of weights; ascent steps: {settings.steps}. The "
        f"models took {minutes:.1f} minutes in all, on {found[0]['hardware']}."
    )


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads each, torch {torch.__version__}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.paper.rank_models", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder of the models and the results")
    add("--dataset", choices=list(DEFAULTS), default="digits", help="default: digits")
    add("--model", choices=WITH_DROPOUT, help="default: mlp for digits, wrn28_2 for cifar10")
    add("--data", type=Path, metavar="ROOT", help="folder of the data set; not for digits")
    add("--download", action="store_true", help="fetch CIFAR-10 if it is missing")
    add("--jobs", type=int, default=1, help="models at a time (default: 1)")
    add("--seed", type=int, default=0, help="of weights, order and dropout (default: 0)")

    add = parser.add_argument_group("the grid", "a model for each combination of these").add_argument
    values: dict[str, Any] = {"nargs": "+", "metavar": "VALUE"}
    add("--batch-size", type=int, **values, default=BATCH_SIZES, help=f"default: {BATCH_SIZES}")
    add("--lr", type=float, **values, default=LEARNING_RATES, help=f"default: {LEARNING_RATES}")
    for name, option in (("--weight-decay", "weight_decay"), ("--dropout", "dropout")):
        defaults = "; ".join(f"{dataset}: {of[option]}" for dataset, of in DEFAULTS.items())
        add(name, type=float, **values, help=f"default: {defaults}")

    add = parser.add_argument_group("the stopping criterion").add_argument
    add("--stop-loss", type=float, default=0.01, help="training loss to reach (default: 0.01)")
    add("--checks", type=int, help="times an epoch to look at it (default: 5 for digits, 1 for cifar10)")
    add("--epochs", type=int, default=60, help="within so many (default: 60)")

    add = parser.add_argument_group("the measures").add_argument
    add("--rho", type=float, default=0.05, help="radius of sharpness for p = 2 (default: 0.05)")
    add("--adaptive-rho", type=float, default=0.5, help="of adaptive sharpness for p = 2 (default: 0.5)")
    add("--steps", type=int, default=20, help="of ascent (default: 20); 1: the epsilon of training")
    add("--images", type=int, default=5000, help="training images to measure on (default: 5000)")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
