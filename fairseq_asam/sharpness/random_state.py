"""Random numbers that two passes have in common."""

from __future__ import annotations

import random
import sys

import torch


class RandomState:
    """The state of every random number generator that a forward pass may use, as it is when made."""

    def __init__(self):
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Set the generators back."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
