"""Sharpness as a measure: what Section 3 and the figures of the paper are about. Needs matplotlib and tqdm,
the extra ``recipes``."""
