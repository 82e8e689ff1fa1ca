"""Lets fairseq load its own checkpoints with newer torch, and resume runs exactly."""

from __future__ import annotations

import argparse
import functools
import os
import time
from typing import IO, Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.tasks import FairseqTask

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


def _resume_with_the_same_batches(get_batch_iterator):
    # fairseq makes its batches once, seeded with the number of that epoch, and reuses them in later epochs.
    # So a run resumed in epoch 5 trains on other batches than one that began with epoch 1. Change that for
    # our optimizers only: the plugin leaves runs with others alone.
    @functools.wraps(get_batch_iterator)
    def from_first_epoch(self, dataset, *args, epoch=1, disable_iterator_cache=False, **kwargs):
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

    return from_first_epoch


def _copy_at_once(copy):
    # fairseq renames its first checkpoint file into place, but copies it to the others byte by byte. Killed
    # during a copy, it would leave a checkpoint_last.pt that cannot be loaded.
    @functools.wraps(copy)
    def copy_at_once(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite or not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        target = os.path.realpath(dst_path)  # a link stays one
        if os.path.exists(target) and not os.path.isfile(target):  # such as /dev/null
            return copy(src_path, target, overwrite=overwrite)
        copied = copy(src_path, target + ".tmp", overwrite=True)
        if copied:
            PathManager.rename(target + ".tmp", target)
        return copied

    return copy_at_once


def _save_from_the_start(obj: Any, f: IO[bytes]) -> None:
    # fairseq tries to save three times, but each attempt writes on where the last one broke off. If the disk
    # was full for a moment, the checkpoint could not be loaded.
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


def _broadcast_object(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
    # With several workers, the first one loads the checkpoint and sends it to the others. In fairseq they
    # read it with torch.load, which since torch 2.6 refuses the configuration in it.
    objects = [obj]
    torch.distributed.broadcast_object_list(objects, src_rank, group, dist_device)
    return objects[0]


def _without_fast_path(init):
    # The fast path for inference calls a private function of torch, which refuses padding since torch 2. Set
    # an attribute: TorchScript could not compile a property.
    @functools.wraps(init)
    def init_without_fast_path(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.can_use_fastpath = False

    return init_without_fast_path


FairseqTask.get_batch_iterator = _resume_with_the_same_batches(FairseqTask.get_batch_iterator)
checkpoint_utils._torch_persistent_save = _save_from_the_start
distributed_utils._broadcast_object_slow = _broadcast_object
PathManager.copy = staticmethod(_copy_at_once(PathManager.copy))
if "can_use_fastpath" in TransformerEncoderLayerBase.__init__.__code__.co_names:  # fairseq 0.12.2
    TransformerEncoderLayerBase.__init__ = _without_fast_path(TransformerEncoderLayerBase.__init__)
