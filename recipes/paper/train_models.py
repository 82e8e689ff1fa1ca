"""Trains and measures the models of a grid, one after the other (Section 3 of the paper).

    python -m recipes.paper.train_models FOLDER --batch-size 32 --lr 0.1

There is a model for each combination of mini-batch size, learning rate, weight decay and dropout rate. All
are trained with SGD, without augmentation or label smoothing, until the loss over the training images has
fallen to one value, the stopping criterion of Jiang et al. (2019).

FOLDER gets a JSON file for each model. A model whose file is there is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_asam import Region, measure
from fairseq_asam.files import write_json
from fairseq_asam.vision import data
from fairseq_asam.vision.batches import Batches, evaluation_loader, seed_of
from fairseq_asam.vision.models import WITH_DROPOUT, build_model

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
#: Defaults that depend on the data set.
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
#: Options that all models of a grid share.
SETTINGS = (
    *("dataset", "model", "stop_loss", "checks", "epochs", "seed"),
    *("rho", "adaptive_rho", "steps", "images"),
)
MOMENTUM = 0.9
EVALUATION_BATCH = 1000

#: Images, N x 3 x H x W, and their labels, N, on the device.
Images = tuple[Tensor, Tensor]


def main() -> None:
    args = arguments(argparse.ArgumentParser(prog="python -m recipes.paper.train_models"))
    train, test, classes = load(args.dataset, args.data)
    for model in models(args):
        file = args.out / file_name(model)
        if not file.exists():
            write_json(file, train_and_measure(model, args, train, test, classes))


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add the options of a grid to *parser* and return what the command line says, defaults filled in.

    Raises:
        SystemExit: In one sentence, a value that cannot be.
    """
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder of the models and the results")
    add("--dataset", choices=list(DEFAULTS), default="digits", help="data set (default: digits)")
    add("--model", choices=WITH_DROPOUT, help="network (default: mlp for digits, wrn28_2 for cifar10)")
    add("--data", type=Path, metavar="ROOT", help="folder of the data set; not for digits")
    add("--seed", type=int, default=0, help="decides weights, order and dropout (default: 0)")

    add = parser.add_argument_group("the grid", "a model for each combination of these").add_argument
    values: dict[str, Any] = {"nargs": "+", "metavar": "VALUE"}
    add(
        "--batch-size",
        type=int,
        **values,
        default=BATCH_SIZES,
        help=f"batch sizes (default: {listed(BATCH_SIZES)})",
    )
    add(
        "--lr",
        type=float,
        **values,
        default=LEARNING_RATES,
        help=f"learning rates (default: {listed(LEARNING_RATES)})",
    )
    for option, what in (("weight_decay", "coefficients of weight decay"), ("dropout", "shares of dropout")):
        defaults = "; ".join(f"{dataset}: {listed(of[option])}" for dataset, of in DEFAULTS.items())
        name = f"--{option.replace('_', '-')}"
        add(name, type=float, **values, help=f"{what} (default: {defaults})")

    add = parser.add_argument_group("the stopping criterion").add_argument
    add("--stop-loss", type=float, default=0.01, help="training loss to reach (default: 0.01)")
    add(
        "--checks",
        type=int,
        help="checks of the training loss in an epoch (default: 5 for digits, 1 for cifar10)",
    )
    add("--epochs", type=int, default=60, help="epochs to reach it in (default: 60)")

    add = parser.add_argument_group("the measures").add_argument
    add("--rho", type=float, default=0.05, help="radius of sharpness for p = 2 (default: 0.05)")
    add(
        "--adaptive-rho",
        type=float,
        default=0.5,
        help="radius of adaptive sharpness for p = 2 (default: 0.5)",
    )
    add("--steps", type=int, default=20, help="steps of ascent; 1: the epsilon of training (default: 20)")
    add("--images", type=int, default=5000, help="training images to measure on (default: 5000)")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        _validate(args)
    except ValueError as error:
        sys.exit(f"{parser.prog.split('.')[-1]}: {error}")
    return args


def listed(values: list) -> str:
    """Return *values* as the command line takes them."""
    return " ".join(map(str, values))


def _validate(args: argparse.Namespace) -> None:
    for option, least in (("batch_size", 2), ("lr", 0.0), ("weight_decay", 0.0), ("dropout", 0.0)):
        for value in getattr(args, option):
            if not least <= value < (1.0 if option == "dropout" else math.inf):
                flag = option.replace("_", "-")
                upper = " and below 1" if option == "dropout" else ""
                raise ValueError(f"--{flag} has the value {value}, but it must be at least {least:g}{upper}")
    for option, least in (("checks", 1), ("epochs", 1), ("steps", 1), ("images", 1), ("seed", 0)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option} is {getattr(args, option)}, but it must be at least {least}")
    if not args.stop_loss > 0:
        raise ValueError(f"--stop-loss is {args.stop_loss}, but it is a loss to reach: choose it above 0")
    regions(args.rho, args.adaptive_rho, weights=1)


def models(args: argparse.Namespace) -> list[dict[str, float]]:
    """Return the hyper-parameters of each model of the grid."""
    values = (getattr(args, option) for option in HYPER_PARAMETERS.values())
    return [dict(zip(HYPER_PARAMETERS.values(), each)) for each in itertools.product(*values)]


def file_name(model: dict[str, float]) -> str:
    return "-".join(f"{option}-{value:g}" for option, value in model.items()) + ".json"


def train_and_measure(
    model: dict[str, float], args: argparse.Namespace, train: Images, test: Images, classes: int
) -> dict[str, Any]:
    """Train *model*, measure it if it reached the stopping criterion, and return what was found."""
    begin = time.perf_counter()
    network, epochs, reached = train_network(model, args, train, classes)
    found: dict[str, Any] = {
        "hyper_parameters": {name: model[option] for name, option in HYPER_PARAMETERS.items()},
        "reached": reached,
    }
    if reached:
        train_loss, train_accuracy = evaluate(network, *train)
        test_loss, test_accuracy = evaluate(network, *test)
        found["generalization_gap"] = test_loss - train_loss
        found["measures"] = measures(network, args, train)
        found.update(train_loss=train_loss, train_accuracy=train_accuracy)
        found.update(test_loss=test_loss, test_accuracy=test_accuracy)
    found.update(epochs=epochs, seconds=time.perf_counter() - begin, hardware=_hardware())
    return {**found, "settings": {name: getattr(args, name) for name in SETTINGS}}


def train_network(
    model: dict[str, float], args: argparse.Namespace, train: Images, classes: int
) -> tuple[nn.Module, float, bool]:
    """Return the network, the number of epochs of its training, and whether it reached the criterion.

    The learning rate falls along a cosine over --epochs.
    """
    images, labels = train
    torch.manual_seed(seed_of(args.seed))
    torch.backends.cudnn.deterministic = True
    network = build_model(args.model, classes, model["dropout"]).to(images.device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=model["lr"], momentum=MOMENTUM, weight_decay=model["weight_decay"]
    )
    batches = Batches(len(images), int(model["batch_size"]), args.seed)
    interval = max(1, len(batches) // args.checks)
    for epoch in range(args.epochs):
        batches.epoch = epoch + 1
        for group in optimizer.param_groups:
            group["lr"] = model["lr"] * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
        for count, draws in enumerate(batches, start=1):
            numbers = torch.tensor([number for number, _ in draws], device=images.device)
            optimizer.zero_grad()
            F.cross_entropy(network(images[numbers]), labels[numbers]).backward()
            optimizer.step()
            if count % interval == 0:
                loss, _ = evaluate(network, images, labels)
                if loss <= args.stop_loss or not math.isfinite(loss):
                    return network, epoch + count / len(batches), math.isfinite(loss)
    return network, args.epochs, False


def measures(network: nn.Module, args: argparse.Namespace, train: Images) -> dict[str, float]:
    """Return the value of each of :data:`MEASURES` on the first --images training images."""
    some = [each[: args.images] for each in train]
    weights = sum(parameter.numel() for parameter in network.parameters())
    of_measures = regions(args.rho, args.adaptive_rho, weights)
    found = measure(lambda: mean_loss(network, *some), network, of_measures, args.steps)
    return {name: sharpness.value for name, sharpness in zip(MEASURES, found)}


def regions(rho: float, adaptive_rho: float, weights: int) -> list[Region]:
    """Return the region of each of :data:`MEASURES` for a network with so many *weights*.

    The regions for p = inf are the largest cubes in those for p = 2.
    """
    return [
        region
        for p, shrink in ((2.0, 1.0), (math.inf, math.sqrt(weights)))
        for region in (
            Region(rho / shrink, p=p, normalization="none"),
            Region(adaptive_rho / shrink, p=p),
        )
    ]


def load(dataset: str, root: Path | None) -> tuple[Images, Images, int]:
    """Return the training images, the test images and the number of classes."""
    loaded = data.load(dataset, root, augmentation="none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def whole(images: data.Images) -> Images:
        batches = zip(*evaluation_loader(images, 0, device))
        inputs, labels = (torch.cat(parts).to(device) for parts in batches)
        return inputs, labels

    return whole(loaded.train), whole(loaded.test), loaded.num_classes


def mean_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield the terms of the mean cross-entropy as :data:`~fairseq_asam.sharpness.measure.Loss` has them."""
    for some, of_some in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH)):
        yield F.cross_entropy(network(some), of_some, reduction="sum"), len(of_some)


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the cross-entropy and the accuracy in evaluation mode; leave *network* in training mode."""
    network.eval()
    outputs = torch.cat([network(some) for some in images.split(EVALUATION_BATCH)])
    network.train()
    accuracy = (outputs.argmax(1) == labels).double().mean()
    return F.cross_entropy(outputs, labels).item(), accuracy.item()


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads each, torch {torch.__version__}"


if __name__ == "__main__":
    main()
