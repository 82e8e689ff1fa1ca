"""Tables 2, 3, 4 and 6 of the paper: SGD, SAM and ASAM on images.

python -m recipes.image_classification.tables 2|3|4|6 [--digits] [--data ROOT] [--rows ROW ...] [--jobs 2]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from recipes.image_classification.grid import SMALL, add_options, by_optimizer, parsed, results_of
from recipes.image_classification.table import publish, summary


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: What it compares.
        rows: The options of `python -m fairseq_asam.vision train` in each row.
        paper: The paper's numbers with SGD, SAM and ASAM.
        seeds: How many runs each cell has.
        corner: What the rows are.
        digits_rows: The rows that --digits makes by default.
        digits_m: The m of SAM and ASAM with --digits (m-sharpness).
        metrics: The measure of each row, where all rows of *paper* are of the same runs.
    """

    title: str
    rows: dict[str, dict[str, Any]]
    paper: dict[str, tuple[str, str, str]]
    seeds: int
    corner: str
    digits_rows: tuple[str, ...]
    digits_m: int | None = None
    metrics: dict[str, str] = field(default_factory=dict)


NETWORKS = {
    "DenseNet-121": "densenet121",
    "ResNet-20": "resnet20",
    "ResNet-56": "resnet56",
    "VGG19-BN": "vgg19_bn",
    "ResNeXt29-32x4d": "resnext29_32x4d",
    "WRN-28-2": "wrn28_2",
    "WRN-28-10": "wrn28_10",
    "PyramidNet-272": "pyramidnet272",
}
NOISE = {"0%": 0.0, "20%": 0.2, "40%": 0.4, "60%": 0.6, "80%": 0.8}

#: Means and standard deviations over 5 runs (PyramidNet-272, Tables 4 and 6: over 3).
TABLES = {
    "2": Table(
        title="eight networks on CIFAR-10",
        rows={row: {"dataset": "cifar10", "model": model} for row, model in NETWORKS.items()},
        paper={
            "DenseNet-121": ("91.00 ± 0.13", "92.00 ± 0.17", "93.33 ± 0.04"),
            "ResNet-20": ("93.18 ± 0.21", "93.56 ± 0.15", "93.82 ± 0.17"),
            "ResNet-56": ("94.58 ± 0.20", "95.18 ± 0.15", "95.42 ± 0.16"),
            "VGG19-BN": (
                "93.87 ± 0.09 (2 of 5 failed)",
                "94.60 (4 of 5 failed)",
                "95.07 ± 0.05 (2 of 5 failed)",
            ),
            "ResNeXt29-32x4d": ("95.84 ± 0.24", "96.34 ± 0.30", "96.80 ± 0.06"),
            "WRN-28-2": ("95.13 ± 0.16", "95.74 ± 0.08", "95.94 ± 0.05"),
            "WRN-28-10": ("96.34 ± 0.12", "96.98 ± 0.04", "97.28 ± 0.07"),
            "PyramidNet-272": ("98.44 ± 0.08", "98.55 ± 0.05", "98.68 ± 0.08"),
        },
        seeds=5,
        corner="model",
        digits_rows=("ResNet-20",),
    ),
    "3": Table(
        title="eight networks on CIFAR-100",
        rows={row: {"dataset": "cifar100", "model": model} for row, model in NETWORKS.items()},
        paper={
            "DenseNet-121": ("68.70 ± 0.31", "69.84 ± 0.12", "70.60 ± 0.20"),
            "ResNet-20": ("69.76 ± 0.44", "71.06 ± 0.31", "71.40 ± 0.30"),
            "ResNet-56": ("73.12 ± 0.19", "75.16 ± 0.05", "75.86 ± 0.22"),
            "VGG19-BN": ("71.80 ± 1.35", "73.52 ± 1.74 (1 of 5 failed)", "75.80 ± 0.27 (1 of 5 failed)"),
            "ResNeXt29-32x4d": ("79.76 ± 0.23", "81.48 ± 0.17", "82.30 ± 0.11"),
            "WRN-28-2": ("75.28 ± 0.17", "77.25 ± 0.35", "77.54 ± 0.14"),
            "WRN-28-10": ("81.56 ± 0.13", "83.42 ± 0.04", "83.68 ± 0.12"),
            "PyramidNet-272": ("88.91 ± 0.12", "89.36 ± 0.20", "89.90 ± 0.13"),
        },
        seeds=5,
        corner="model",
        digits_rows=("ResNet-20",),
    ),
    "4": Table(
        title="ResNet-50 on ImageNet, m = 128",
        rows={"ResNet-50": {"dataset": "imagenet", "model": "resnet50"}},
        paper={
            "Top1": ("75.79 ± 0.22", "76.39 ± 0.03", "76.63 ± 0.18"),
            "Top5": ("92.62 ± 0.04", "92.97 ± 0.07", "93.16 ± 0.18"),
        },
        seeds=3,
        corner="ResNet-50",
        digits_rows=("ResNet-50",),
        digits_m=SMALL["batch_size"] // 4,  # as 128 is a quarter of 512
        metrics={"Top1": "test_accuracy", "Top5": "test_top5_accuracy"},
    ),
    "6": Table(
        title="ResNet-32 on CIFAR-10 with wrong training labels",
        rows={
            row: {"dataset": "cifar10", "model": "resnet32", "label_noise": noise}
            for row, noise in NOISE.items()
        },
        paper={
            "0%": ("94.50 ± 0.11", "94.80 ± 0.12", "94.88 ± 0.12"),
            "20%": ("91.32 ± 0.23", "92.94 ± 0.12", "93.21 ± 0.10"),
            "40%": ("87.68 ± 0.05", "90.62 ± 0.18", "90.89 ± 0.13"),
            "60%": ("82.50 ± 0.30", "86.58 ± 0.30", "87.41 ± 0.16"),
            "80%": ("68.35 ± 0.85", "69.92 ± 0.98", "67.69 ± 1.34"),
        },
        seeds=3,
        corner="noise rate",
        digits_rows=("20%", "40%", "60%", "80%"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Tables 2, 3, 4 and 6 of the paper: SGD, SAM and ASAM on images."
    )
    commands = parser.add_subparsers(dest="table", required=True, metavar="|".join(TABLES))
    for number, table in TABLES.items():
        what = f"Table {number} of the paper: {table.title}."
        command = commands.add_parser(number, help=table.title, description=what)
        add_options(command, f"table{number}", table.seeds, list(table.rows), table.digits_rows)
    args = parsed(parser)
    table = TABLES[args.table]
    cells = by_optimizer({row: table.rows[row] for row in args.rows}, args.digits)
    for (_, column), options in cells.items():
        if args.digits and table.digits_m and column != "SGD":
            options["m_sharpness"] = table.digits_m  # the long name, since torchrun takes --m for its own
    results = results_of(cells, args)
    summaries = {cell: summary(of_cell) for cell, of_cell in results.items()}
    if table.metrics:
        summaries = {
            (row, column): summary(of_cell, metric)
            for row, metric in table.metrics.items()
            for (_, column), of_cell in results.items()
        }
    publish(args, table.corner, summaries, results, table.paper)


if __name__ == "__main__":
    main()
