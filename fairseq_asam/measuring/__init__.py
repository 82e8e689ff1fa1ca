"""Measures the sharpness of fairseq checkpoints from the command line."""
