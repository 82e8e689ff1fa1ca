"""Table 6 of the paper: SGD, SAM and ASAM with ResNet-32 on CIFAR-10 with wrong training labels.

python -m recipes.image_classification.table6 [--digits] [--data ROOT] [--jobs 2] [--seeds 3] [--dry-run]
"""

from __future__ import annotations

from recipes.image_classification.grid import arguments, by_optimizer, results_of
from recipes.image_classification.table import publish, summary

PAPER = {
    "0%": ("94.50 ± 0.11", "94.80 ± 0.12", "94.88 ± 0.12"),
    "20%": ("91.32 ± 0.23", "92.94 ± 0.12", "93.21 ± 0.10"),
    "40%": ("87.68 ± 0.05", "90.62 ± 0.18", "90.89 ± 0.13"),
    "60%": ("82.50 ± 0.30", "86.58 ± 0.30", "87.41 ± 0.16"),
    "80%": ("68.35 ± 0.85", "69.92 ± 0.98", "67.69 ± 1.34"),
}


def main() -> None:
    description = (
        "Table 6 of the paper: SGD, SAM and ASAM with ResNet-32 on CIFAR-10 with wrong training labels."
    )
    rows = list(PAPER)
    args = arguments("table6", description, seeds=3, rows=rows, digits_rows=rows[1:])
    options = {} if args.digits else {"dataset": "cifar10", "model": "resnet32"}
    noisy = {row: {**options, "label_noise": int(row.rstrip("%")) / 100} for row in args.rows}
    results = results_of(by_optimizer(noisy, args.digits), args)
    publish(args, "noise rate", {cell: summary(runs) for cell, runs in results.items()}, results, PAPER)


if __name__ == "__main__":
    main()
