"""The functions of fairseq that the plugin replaces: each one, why, and the test that fails without it.

Who trains with another optimizer notices none of them, but for the errors of fairseq that some mend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from fairseq import checkpoint_utils, options, tasks
from fairseq.data import data_utils
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from . import checkpoints, start_up, trainer


class Patch(NamedTuple):
    """A function of fairseq that is replaced.

    Attributes:
        owner: the module or class that has it.
        name: its name there.
        replacement: takes the function, and returns the one in its place.
        why: what happens without.
        test: the test that fails without, as pytest names it.
    """

    owner: Any
    name: str
    replacement: Callable[[Callable], Callable]
    why: str
    test: str


PATCHES = [
    Patch(
        tasks,
        "setup_task",
        start_up.with_check_of_the_configuration,
        "A run would begin that our optimizers cannot make. This is the first function that fairseq calls "
        "with a whole configuration.",
        "tests/tasks/test_start_up.py::test_the_part_of_the_data_that_is_missing_is_named",
    ),
    Patch(
        options,
        "parse_args_and_arch",
        start_up.with_help_for_optimizers,
        "fairseq answers --help before it adds the options of the optimizer.",
        "tests/tasks/test_start_up.py::test_help_lists_our_options_beside_those_of_the_base_optimizer",
    ),
    Patch(
        Trainer,
        "get_train_iterator",
        trainer.with_sharpness_aware_task,
        "The task would make its batches before it is sharpness-aware, and not know how many updates there "
        "will be. The Trainer meets every task. Subclasses made in advance would not reach them all: many "
        "tasks name their own class.",
        "tests/tasks/test_late_start.py::test_a_start_beyond_the_end_is_refused_before_training",
    ),
    Patch(
        Trainer,
        "train_step",
        trainer.with_beginning_of_the_update,
        "The optimizer would not know where an update begins, nor of how many micro-batches it is.",
        "tests/tasks/test_train_step.py::test_the_step_is_algorithm_1",
    ),
    Patch(
        LegacyDistributedDataParallel,
        "no_sync",
        trainer.left_after_an_exception,
        "fairseq's own stays in force after an exception. When a worker runs out of memory in a pass, it "
        "would not add up gradients any more.",
        "tests/tasks/test_workers.py::test_out_of_memory_in_one_worker",
    ),
    Patch(
        data_utils,
        "numpy_seed",
        trainer.under_the_lock_of_random_states,
        "With --num-workers 0, a thread loads data while passes are made. Where it seeds numpy to draw "
        "noise, as for masked language models, a pass at w + epsilon would restore numpy's state in between.",
        "tests/tasks/test_trainer.py::"
        "test_data_that_a_thread_loads_during_the_passes_have_the_noise_of_their_seed",
    ),
    Patch(
        FairseqTask,
        "get_batch_iterator",
        checkpoints.from_the_first_epoch,
        "fairseq makes its batches once, seeded with the number of that epoch, and reuses them in later "
        "epochs. A run resumed in epoch 5 would train on other batches than one that began with epoch 1.",
        "tests/tasks/test_checkpoints.py::test_a_resumed_epoch_has_the_batches_of_an_uninterrupted_run",
    ),
    Patch(
        checkpoint_utils,
        "_torch_persistent_save",
        checkpoints.saved_from_the_start,
        "fairseq tries to save three times, but each attempt writes on where the last one broke off. If the "
        "disk was full for a moment, the checkpoint could not be loaded.",
        "tests/tasks/test_checkpoints.py::test_an_attempt_to_save_begins_where_the_file_does",
    ),
    Patch(
        PathManager,
        "copy",
        checkpoints.copied_whole_or_not_at_all,
        "fairseq renames its first checkpoint file into place, but copies it to the others byte by byte. "
        "Killed during a copy, it would leave a checkpoint_last.pt that cannot be loaded.",
        "tests/tasks/test_checkpoints.py::test_a_copy_that_breaks_off_leaves_the_last_checkpoint_whole",
    ),
    Patch(
        distributed_utils,
        "_broadcast_object_slow",
        checkpoints.broadcast_by_torch,
        "With several workers, the first one loads the checkpoint and sends it to the others. In fairseq "
        "they read it with torch.load, which since torch 2.6 refuses the configuration in it.",
        "tests/tasks/test_workers.py::test_workers_receive_the_configuration_of_a_checkpoint",
    ),
]
if "can_use_fastpath" in TransformerEncoderLayerBase.__init__.__code__.co_names:  # fairseq 0.12.2
    PATCHES.append(
        Patch(
            TransformerEncoderLayerBase,
            "__init__",
            checkpoints.without_fast_path,
            "The fast path for inference calls a private function of torch, which refuses padding since "
            "torch 2.",
            "tests/tasks/test_checkpoints.py::test_a_loaded_encoder_takes_padding_on_either_side",
        )
    )


def apply_patches() -> None:
    """Replace the functions of :data:`PATCHES`. Call it once."""
    for patch in PATCHES:
        function: Any = patch.replacement(getattr(patch.owner, patch.name))
        if isinstance(inspect.getattr_static(patch.owner, patch.name), staticmethod):
            function = staticmethod(function)
        setattr(patch.owner, patch.name, function)
