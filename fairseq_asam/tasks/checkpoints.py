"""Lets fairseq load its own checkpoints with newer torch, and go on from them as if never stopped."""

from __future__ import annotations

import argparse
import functools
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

from .sharpness_aware import SharpnessAwareTask


def _of_numpy_1(function):
    @functools.wraps(function)
    def renamed(*args):
        return function(*args)

    renamed.__module__ = "numpy.core.multiarray"
    return renamed


# torch >= 2.6 loads nothing but tensors and types known to be safe. A fairseq checkpoint holds its arguments
# as a Namespace, numpy scalars and arrays where a meter made some (those of --eval-bleu are arrays), and the
# dictionaries of tasks of speech and of HuBERT. None of these runs code of its own when it is loaded.
_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
_DTYPES = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
SAFE_TYPES = [
    argparse.Namespace,
    Dictionary,
    _multiarray.scalar,
    _multiarray._reconstruct,
    # numpy 2 has another name for them than the checkpoints that were saved with numpy 1
    _of_numpy_1(_multiarray.scalar),
    _of_numpy_1(_multiarray._reconstruct),
    np.ndarray,
    np.dtype,
    *_DTYPES,
]

if hasattr(torch.serialization, "add_safe_globals"):
    torch.serialization.add_safe_globals(SAFE_TYPES)


def _resume_with_the_same_batches(get_batch_iterator):
    # fairseq makes its batches once, seeded with the number of the epoch in which it does, and reuses
    # them in later epochs. A run resumed in epoch 5 would train on other batches than one that began
    # with epoch 1. With a plain optimizer it stays so, as in a fairseq without this plugin.
    @functools.wraps(get_batch_iterator)
    def from_first_epoch(self, dataset, *args, epoch=1, disable_iterator_cache=False, **kwargs):
        reused = (
            isinstance(self, SharpnessAwareTask)
            and not disable_iterator_cache
            and not kwargs.get("update_epoch_batch_itr", False)
            and self.can_reuse_epoch_itr(dataset)
        )
        options = dict(kwargs, disable_iterator_cache=disable_iterator_cache)
        if not reused or dataset in self.dataset_to_epoch_iter:
            return get_batch_iterator(self, dataset, *args, epoch=epoch, **options)
        iterator = get_batch_iterator(self, dataset, *args, epoch=1, **options)
        iterator.epoch = max(epoch, 1)
        return iterator

    return from_first_epoch


def _copy_at_once(copy):
    # fairseq writes the first of its checkpoint files at once or not at all, but copies it to the others
    # byte by byte: killed meanwhile, it would leave a checkpoint_last.pt that cannot be loaded.
    @functools.wraps(copy)
    def copy_at_once(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not overwrite or not PathManager.supports_rename(dst_path):
            return copy(src_path, dst_path, overwrite=overwrite)
        copied = copy(src_path, dst_path + ".tmp", overwrite=True)
        PathManager.rename(dst_path + ".tmp", dst_path)
        return copied

    return copy_at_once


def _save_from_the_start(obj: Any, f: IO[bytes]) -> None:
    # fairseq tries to save three times, but goes on in the file where the last attempt broke off: a disk
    # that was full for a moment would leave a checkpoint that cannot be loaded.
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
    # With several workers, the first one loads the checkpoint and sends it to the others. fairseq has these
    # unpack it with torch.load, which from torch 2.6 on refuses the configuration in it.
    objects = [obj]
    torch.distributed.broadcast_object_list(objects, src_rank, group, dist_device)
    return objects[0]


def _without_fast_path(init):
    # The fast path for inference calls a private function of torch, and torch 2 refuses padding there. This
    # sets an attribute, since TorchScript could not compile a property.
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
