"""Sharpness as a measure: what Section 3 and the figures of the paper are about. Needs the
extra ``recipes``, but ``measuring``, which ``fairseq_asam.vision`` shares, tqdm alone."""
