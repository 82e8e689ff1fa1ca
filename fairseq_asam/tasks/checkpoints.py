"""Lets fairseq load its own checkpoints with torch >= 2.6, whose ``torch.load`` is safe by default."""

import argparse

import numpy as np
import torch

# A fairseq checkpoint holds its arguments as a Namespace, and numpy scalars where a meter made some.
_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
SAFE_TYPES = [argparse.Namespace, _multiarray.scalar, np.dtype, *{type(np.dtype(t)) for t in "?bhilqBHILQefd"}]

if hasattr(torch.serialization, "add_safe_globals"):
    torch.serialization.add_safe_globals(SAFE_TYPES)
