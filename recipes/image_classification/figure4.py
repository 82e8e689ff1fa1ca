"""Figure 4 of the paper: ASAM over rho with each normalization, norm, and with biases normalized or not.

python -m recipes.image_classification.figure4 [--digits] [--data ROOT] [--jobs 2] [--seeds 3] [--dry-run]

The paper does not say on which data set it trained WRN-16-8: this is CIFAR-10.
"""

from __future__ import annotations

import argparse

from recipes.image_classification.grid import DIGITS, add_options, parsed, results_of
from recipes.image_classification.rho_search import RHOS
from recipes.image_classification.table import as_markdown, dataset_of, described, draw_sweep, summary, write

VARIANTS = {
    "element-wise, p = inf": {"p_norm": "inf"},
    "element-wise, p = 2": {},
    "element-wise, p = 2, bias normalized": {"normalize_bias": True},
    "filter-wise, p = 2": {"normalization": "filter-wise"},
}
# With p = inf, epsilon moves each weight by the share rho of its size. To move k weights as far with p = 2,
# rho must be sqrt(k) times as large. The network of --digits has 19,954 weights.
DIGITS_RHOS = {"inf": [0.001, 0.005, 0.02], 2: [0.2, 1.0, 2.0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Figure 4 of the paper: ASAM over rho with each normalization."
    )
    add_options(parser, "figure4", seeds=3)
    args = parsed(parser)
    if args.digits:
        setting = DIGITS["asam"]
    else:
        setting = {"dataset": "cifar10", "model": "wrn16_8", "optimizer": "asam"}
    cells = {
        (f"{rho:g}", variant): {**setting, **options, "optimizer": "asam", "rho": rho}
        for variant, options in VARIANTS.items()
        for rho in (DIGITS_RHOS[options.get("p_norm", 2)] if args.digits else RHOS)
    }
    results = results_of(cells, args)
    summaries = {cell: summary(of_cell) for cell, of_cell in results.items()}
    note = described(results)
    figure = draw_sweep(summaries, f"ASAM on {dataset_of(results)}", "maximum test accuracy (%)")
    write(args.out, args.name, as_markdown("rho", summaries, note=note), figure, note=note, cells=summaries)


if __name__ == "__main__":
    main()
