"""Measures sharpness from the command line: of fairseq checkpoints here, of image runs in
:mod:`fairseq_asam.vision`."""
