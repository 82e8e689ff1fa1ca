"""The same random numbers in two passes."""

from __future__ import annotations

import random
import sys
import threading
from typing import Any

import torch


class RandomState:
    """A snapshot of the random generators: :meth:`restore` makes the generators draw the same numbers again.

    It saves the states of the generators of Python, torch and numpy. It also records the seeds of generators
    that ``numpy.random.default_rng()`` makes on this thread, until the next RandomState is made or
    :meth:`release` is called: fairseq's wav2vec draws its masks from such fresh generators.

    Attributes:
        lock: held while the states are saved and restored. A thread that seeds a generator for a while, for
            example to load data, must hold it meanwhile.
    """

    lock = threading.RLock()

    def __init__(self):
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._numpy = None
        with self.lock:
            self._python, self._torch = random.getstate(), torch.get_rng_state()
            if "numpy" in sys.modules:  # torch works without numpy, and so does this package
                self._numpy = sys.modules["numpy"].random.get_state()
        self._seeds: list[int] = []
        self._begin()

    def restore(self) -> None:
        """Put all generators back, so that they draw the same numbers again."""
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        with self.lock:
            random.setstate(self._python)
            torch.set_rng_state(self._torch)
            if self._numpy is not None:
                sys.modules["numpy"].random.set_state(self._numpy)
        self._begin()

    @staticmethod
    def release() -> None:
        """Stop recording on this thread, and give numpy its own ``default_rng()`` back."""
        _recording.state = None
        if "numpy" in sys.modules and sys.modules["numpy"].random.default_rng is _default_rng:
            sys.modules["numpy"].random.default_rng = _numpys_default_rng

    def _begin(self) -> None:
        global _numpys_default_rng
        self._used = 0
        _recording.state = self
        numpy_random = None if self._numpy is None else sys.modules["numpy"].random
        if numpy_random is not None and numpy_random.default_rng is not _default_rng:
            _numpys_default_rng = numpy_random.default_rng
            numpy_random.default_rng = _default_rng

    def _seed(self) -> int:
        if self._used == len(self._seeds):
            self._seeds.append(sys.modules["numpy"].random.SeedSequence().entropy)
        self._used += 1
        return self._seeds[self._used - 1]


# Each thread's RandomState that records seeds. Do not keep it in a class attribute: CPython frees a replaced
# value before it clears its cache of such attributes, and freeing a tensor lets other threads run.
_recording = threading.local()
_numpys_default_rng: Any = None  # which ours replaces while seeds are recorded


def _default_rng(seed: Any = None) -> Any:
    state = getattr(_recording, "state", None)
    if seed is None and state is not None:
        seed = state._seed()
    return _numpys_default_rng(seed)
