"""Lets fairseq load its own checkpoints with newer torch, and resume runs exactly."""

from __future__ import annotations

import argparse
import functools
import os
import time
from typing import IO, Any

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.file_io import PathManager

from .train_step import SharpnessAwareTask


def _of_numpy_1(function):
    @functools.wraps(function)
    def renamed(*args):
        return function(*args)

    renamed.__module__ = "numpy.core.multiarray"
    return renamed


# torch >= 2.6 loads only tensors and types that are named safe. A fairseq checkpoint also holds its arguments
# as a Namespace, numpy scalars and arrays that meters made (those of --eval-bleu are arrays), and the
# dictionaries of HuBERT and of speech tasks. None of these runs code of its own when it is loaded.
_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
_DTYPES = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
SAFE_TYPES = [
    argparse.Namespace,
    Dictionary,
    _multiarray.scalar,
    _multiarray._reconstruct,
    # Checkpoints saved with numpy 1 name these two by another module than numpy 2 does.
    _of_numpy_1(_multiarray.scalar),
    _of_numpy_1(_multiarray._reconstruct),
    np.ndarray,
    np.dtype,
    *_DTYPES,
]

if hasattr(torch.serialization, "add_safe_globals"):
    torch.serialization.add_safe_globals(SAFE_TYPES)


def from_the_first_epoch(get_batch_iterator):
    """Return ``get_batch_iterator``, which gives a run that resumes the batches that it would have had.

    Those of other optimizers than ours stay as they are.
    """

    @functools.wraps(get_batch_iterator)
    def get_batch_iterator_of_the_first_epoch(
        self, dataset, *args, epoch=1, disable_iterator_cache=False, **kwargs
    ):
        reused = (
            isinstance(self, SharpnessAwareTask)
            and not disable_iterator_cache
            and not kwargs.get("update_epoch_batch_itr", False)
            and self.can_reuse_epoch_itr(dataset)
        )
        options = dict(kwargs, disable_iterator_cache=disable_iterator_cache)
        if epoch <= 1 or not reused or dataset in self.dataset_to_epoch_iter:
            return get_batch_iterator(self, dataset, *args, epoch=epoch, **options)
        if self.seed_of_batches is not None:
            options["seed"] = self.seed_of_batches
        iterator = get_batch_iterator(self, dataset, *args, epoch=1, **options)
        iterator.epoch = epoch
        return iterator

    return get_batch_iterator_of_the_first_epoch


def copied_whole_or_not_at_all(copy):
    """Return ``PathManager.copy``, which replaces a file only when its copy is complete."""

    @functools.wraps(copy)
    def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite or not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        target = os.path.realpath(dst_path)  # a link stays one
        if os.path.exists(target) and not os.path.isfile(target):  # such as /dev/null
            return copy(src_path, target, overwrite=overwrite)
        copied = copy(src_path, target + ".tmp", overwrite=True)
        if copied:
            PathManager.rename(target + ".tmp", target)
        return copied

    return copy_whole


def saved_from_the_start(save):
    """Return ``_torch_persistent_save``, each of whose attempts begins at the start of the file."""

    @functools.wraps(save)
    def save_from_the_start(obj: Any, f: IO[bytes]) -> None:
        for pause in (2.5, 2.5, None):
            if f.seekable():
                f.seek(0)
                f.truncate()
            try:
                return torch.save(obj, f)
            except Exception:
                if pause is None:
                    raise
                time.sleep(pause)

    return save_from_the_start


def broadcast_by_torch(broadcast_object):
    """Return ``_broadcast_object_slow``, which lets torch read what the first worker has sent."""

    @functools.wraps(broadcast_object)
    def broadcast(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
        objects = [obj]
        torch.distributed.broadcast_object_list(objects, src_rank, group, dist_device)
        return objects[0]

    return broadcast


def without_fast_path(init):
    """Return ``__init__`` of an encoder layer, which leaves the fast path for inference alone."""

    @functools.wraps(init)
    def init_without_fast_path(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.can_use_fastpath = False  # an attribute: TorchScript could not compile a property

    return init_without_fast_path
