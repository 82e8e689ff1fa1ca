"""Table 3 of the paper: SGD, SAM and ASAM on CIFAR-100.

python -m recipes.image_classification.table3 [--digits] [--data ROOT] [--rows ResNet-20] [--jobs 2]
"""

from __future__ import annotations

from recipes.image_classification.table2 import make_table

#: With SGD, SAM and ASAM, mean and standard deviation over 5 runs, of PyramidNet-272 over 3.
PAPER = {
    "DenseNet-121": ("68.70 ± 0.31", "69.84 ± 0.12", "70.60 ± 0.20"),
    "ResNet-20": ("69.76 ± 0.44", "71.06 ± 0.31", "71.40 ± 0.30"),
    "ResNet-56": ("73.12 ± 0.19", "75.16 ± 0.05", "75.86 ± 0.22"),
    "VGG19-BN": ("71.80 ± 1.35", "73.52 ± 1.74 (1 of 5 failed)", "75.80 ± 0.27 (1 of 5 failed)"),
    "ResNeXt29-32x4d": ("79.76 ± 0.23", "81.48 ± 0.17", "82.30 ± 0.11"),
    "WRN-28-2": ("75.28 ± 0.17", "77.25 ± 0.35", "77.54 ± 0.14"),
    "WRN-28-10": ("81.56 ± 0.13", "83.42 ± 0.04", "83.68 ± 0.12"),
    "PyramidNet-272": ("88.91 ± 0.12", "89.36 ± 0.20", "89.90 ± 0.13"),
}

if __name__ == "__main__":
    make_table("table3", "Table 3 of the paper: SGD, SAM and ASAM on CIFAR-100.", "cifar100", PAPER)
