"""Image classification with SGD, SAM or ASAM.

    python -m fairseq_asam.vision train --dataset cifar10 --data ROOT --model resnet20 --optimizer asam \\
        --output RUN
    python -m fairseq_asam.vision sharpness RUN --data ROOT --rho 0.05 0.1 0.2

The first command saves a checkpoint in RUN after every epoch, from which the same command goes on, and
result.json at the end. The second measures the sharpness of the checkpoint.
"""

from __future__ import annotations

import argparse

from . import measure_run
from .options import TrainOptions, add_options
from .train import Run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fairseq_asam.vision", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    add_options(commands.add_parser("train", help="start a run, or go on with it"))
    measure_run.add_arguments(
        commands.add_parser(
            "sharpness",
            help="measure sharpness and adaptive sharpness of a run",
            description=measure_run.__doc__,
        )
    )
    args = parser.parse_args(arguments)
    options = vars(args)
    command = options.pop("command")
    try:
        if command == "sharpness":
            return measure_run.measure_run(args)
        run = Run(TrainOptions(**options))
    except (ValueError, FileNotFoundError) as error:
        commands.choices[command].error(str(error))
    run.finish()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
