"""Table 4 of the paper: SGD, SAM and ASAM with ResNet-50 on ImageNet, m = 128.

python -m recipes.image_classification.table4 [--digits] [--data ROOT] [--jobs 2] [--seeds 3] [--dry-run]
"""

from __future__ import annotations

from recipes.image_classification.grid import DIGITS, arguments, by_optimizer, results_of
from recipes.image_classification.table import publish, summary

METRICS = {"Top1": "test_accuracy", "Top5": "test_top5_accuracy"}
PAPER = {
    "Top1": ("75.79 ± 0.22", "76.39 ± 0.03", "76.63 ± 0.18"),
    "Top5": ("92.62 ± 0.04", "92.97 ± 0.07", "93.16 ± 0.18"),
}


def main() -> None:
    args = arguments("table4", "Table 4 of the paper: SGD, SAM and ASAM with ResNet-50 on ImageNet.", seeds=3)
    options = {} if args.digits else {"dataset": "imagenet", "model": "resnet50"}
    cells = by_optimizer({"ResNet-50": options}, args.digits)
    if args.digits:  # a quarter of the batch, as 128 is of 512
        for column in ("SAM", "ASAM"):
            # the long name, since torchrun takes --m for an option of its own
            cells["ResNet-50", column]["m_sharpness"] = DIGITS[column.lower()]["batch_size"] // 4
    results = results_of(cells, args)
    summaries = {
        (row, column): summary(of_cell, metric)
        for row, metric in METRICS.items()
        for (_, column), of_cell in results.items()
    }
    publish(args, "ResNet-50", summaries, results, PAPER)


if __name__ == "__main__":
    main()
