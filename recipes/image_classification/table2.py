"""Table 2 of the paper: SGD, SAM and ASAM on CIFAR-10.

python -m recipes.image_classification.table2 [--digits] [--data ROOT] [--rows ResNet-20] [--jobs 2]
"""

from __future__ import annotations

from recipes.image_classification.grid import arguments, by_optimizer, results_of
from recipes.image_classification.table import publish, summary

MODELS = {
    "DenseNet-121": "densenet121",
    "ResNet-20": "resnet20",
    "ResNet-56": "resnet56",
    "VGG19-BN": "vgg19_bn",
    "ResNeXt29-32x4d": "resnext29_32x4d",
    "WRN-28-2": "wrn28_2",
    "WRN-28-10": "wrn28_10",
    "PyramidNet-272": "pyramidnet272",
}

#: With SGD, SAM and ASAM, mean and standard deviation over 5 runs, of PyramidNet-272 over 3.
PAPER = {
    "DenseNet-121": ("91.00 ± 0.13", "92.00 ± 0.17", "93.33 ± 0.04"),
    "ResNet-20": ("93.18 ± 0.21", "93.56 ± 0.15", "93.82 ± 0.17"),
    "ResNet-56": ("94.58 ± 0.20", "95.18 ± 0.15", "95.42 ± 0.16"),
    "VGG19-BN": ("93.87 ± 0.09 (2 of 5 failed)", "94.60 (4 of 5 failed)", "95.07 ± 0.05 (2 of 5 failed)"),
    "ResNeXt29-32x4d": ("95.84 ± 0.24", "96.34 ± 0.30", "96.80 ± 0.06"),
    "WRN-28-2": ("95.13 ± 0.16", "95.74 ± 0.08", "95.94 ± 0.05"),
    "WRN-28-10": ("96.34 ± 0.12", "96.98 ± 0.04", "97.28 ± 0.07"),
    "PyramidNet-272": ("98.44 ± 0.08", "98.55 ± 0.05", "98.68 ± 0.08"),
}


def make_table(name: str, description: str, dataset: str, paper: dict[str, tuple[str, ...]]) -> None:
    args = arguments(name, description, seeds=5, rows=list(MODELS), digits_rows=["ResNet-20"])
    rows = {row: {} if args.digits else {"dataset": dataset, "model": MODELS[row]} for row in args.rows}
    results = results_of(by_optimizer(rows, args.digits), args)
    publish(args, "model", {cell: summary(of_cell) for cell, of_cell in results.items()}, results, paper)


if __name__ == "__main__":
    make_table("table2", "Table 2 of the paper: SGD, SAM and ASAM on CIFAR-10.", "cifar10", PAPER)
