"""Image classification with SGD, SAM or ASAM.

    python -m fairseq_asam.vision train --dataset cifar10 --data ROOT --model wrn28_10 --output RUN
    python -m fairseq_asam.vision sharpness RUN --data ROOT --rho 0.05 0.1 0.2

RUN gets result.json when the run is finished, and before that a checkpoint after every epoch, from which
the same command goes on. The second command measures the sharpness of the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq_asam import NORMALIZATIONS

from . import sharpness
from .data import DATASETS
from .models import MODELS
from .options import BATCH_NORM_STATISTICS, MIXED_PRECISION, OPTIMIZERS, TrainOptions
from .train import Run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fairseq_asam.vision", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    train = commands.add_parser(
        "train", help="make a run, or go on with it", argument_default=argparse.SUPPRESS
    )
    add_options(train)
    of_a_run = commands.add_parser(
        "sharpness",
        help="measure sharpness and adaptive sharpness of a run",
        description=sharpness.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sharpness.add_arguments(of_a_run)
    args = vars(parser.parse_args(arguments))
    command = args.pop("command")
    try:
        if command == "sharpness":
            return sharpness.measure_run(argparse.Namespace(**args))
        run = Run(TrainOptions(**args))
    except (ValueError, FileNotFoundError) as error:
        commands.choices[command].error(str(error))
    run.finish()
    run.accelerator.end_training()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add every option of :class:`TrainOptions`. The paper's value for the data set, the model and the
    optimizer stands for one that is not given."""
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), required=True)
    add("--model", choices=list(MODELS), required=True)
    add("--optimizer", choices=OPTIMIZERS, required=True, help="SGD with momentum is the base of all three")
    add("--output", type=Path, metavar="RUN", required=True, help="folder of the run")
    add("--data", type=Path, metavar="ROOT", help="folder of the data set (not needed for digits)")
    add("--download", action="store_true", help="let torchvision download what is missing there")
    add("--workers", type=int, help="processes that load images")

    region = parser.add_argument_group("the maximization region (sam and asam)")
    add = region.add_argument
    add("--rho", type=float, help="its radius (Equation 2, Equation 4)")
    add("--eta", type=float, help="added to the normalization operator (default: 0.01)")
    add("--p-norm", type=float, help="norm that bounds it, 1 < p <= inf (default: 2)")
    add("--normalization", choices=NORMALIZATIONS, help="operator T_w (default: element-wise; for sam, none)")
    add("--normalize-bias", action="store_true", help="normalize biases like other weights (Figure 4)")
    add(
        "--m",
        "--m-sharpness",  # torchrun takes --m for one of its own
        type=int,
        metavar="M",
        help="images that have an epsilon of their own (m-sharpness); 0: the whole batch",
    )
    add(
        "--batch-norm-statistics",
        choices=BATCH_NORM_STATISTICS,
        help="take them in the first pass, at w (default), or in both, as the paper's code does",
    )

    training = parser.add_argument_group("the training")
    add = training.add_argument
    add("--batch-size", type=int, help="over all processes")
    add("--epochs", type=int, help="how many")
    add("--lr", type=float, help="initial learning rate, which then falls along a cosine")
    add("--momentum", type=float, help="default: 0.9")
    add("--weight-decay", type=float, help="coefficient lambda")
    add("--label-smoothing", type=float, help="default: 0.1")
    add("--label-noise", type=float, help="share of training labels to replace (Table 6; default: 0)")
    add("--augmentation", choices=("none", "standard", "autoaugment"))
    add("--cutmix", action=argparse.BooleanOptionalAction, help="mix the images of a batch")
    add("--hold-out", type=int, help="evaluate on so many training images, not on the test set")
    add("--seed", type=int, help="decides weights, order, augmentation and label noise (default: 0)")
    add("--mixed-precision", choices=MIXED_PRECISION, help="default: no, which is float32")


if __name__ == "__main__":
    main()
