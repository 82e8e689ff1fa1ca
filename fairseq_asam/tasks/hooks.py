"""Replaces functions of fairseq when it is imported: refusals at start-up, updates, --help."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from fairseq import options, tasks, utils
from fairseq.data import data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.file_io import PathManager
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.trainer import Trainer
from omegaconf import DictConfig

from fairseq_asam.optim import SHARPNESS_AWARE, sharpness_aware_optimizer, validate_config
from fairseq_asam.optim.options import direction_of, in_adams_metric
from fairseq_asam.sharpness.late_start import first_ascent
from fairseq_asam.sharpness.random_state import RandomState

from .train_step import SharpnessAwareTask, with_sharpness_awareness


def check_configuration(cfg: Any) -> None:
    """Check a whole fairseq configuration whose optimizer is sharpness-aware.

    Raises:
        ValueError: it asks for something that the optimizer cannot do, or names data that do not exist.
    """
    validate_config(cfg.optimizer)
    data = getattr(cfg.task, "data", None)  # some tasks have no such option, and some need no data
    for path in utils.split_paths(data or ""):
        if path and not PathManager.exists(path):
            raise ValueError(f"there is no data in {path}: name the data of --task {cfg.task._name}")
    common, distributed, backend = cfg.common, cfg.distributed_training, cfg.distributed_training.ddp_backend
    no_masters = "half-precision weights without float32 masters absorb epsilon"
    moves_weights = "it moves weights between the steps of the optimizer"
    in_parts = "each worker sees only a part of the weights, and epsilon needs the norm over all"
    flattened = "fairscale's FSDP runs on GPUs only, and hides the names and shapes of weights"
    over_gpus = "it spreads a worker's weights over several GPUs, where epsilon has not been tried"
    noised = "each forward pass overwrites the weights with noised ones, at w + epsilon too"
    in_shards, reuses = distributed.zero_sharding != "none", cfg.optimizer.ascent_interval > 1
    component = "the component that it reuses would have to be shared out like the optimizer's state"
    scaled = getattr(cfg.optimizer, "fp16_adam_stats", False)
    needs_moments = {
        f"--ascent-direction {cfg.optimizer.ascent_direction}": direction_of(cfg.optimizer).needs_optimizer,
        "--normalization adam": in_adams_metric(cfg.optimizer),
    }
    without_moments = [
        (
            "--zero-sharding os",
            in_shards,
            "a worker has the optimizer's state of its part of the weights only",
        ),
        ("--fp16-adam-stats", scaled, "each weight's moment then has a scale of its own"),
    ]
    bfloat16 = "use fairseq-hydra-train with common.bf16=true, or --fp16"
    pytorch_ddp = "use --ddp-backend pytorch_ddp"
    backends = {"fully_sharded": flattened, "slowmo": moves_weights}
    refusals = [
        ("--bf16", common.bf16 and common.tpu, "fairseq-train takes it for a TPU", bfloat16),
        ("--tpu", common.tpu, "it has not been tried there", "use GPUs or CPUs"),
        ("--memory-efficient-fp16", common.memory_efficient_fp16, no_masters, "use --fp16"),
        ("--memory-efficient-bf16", common.memory_efficient_bf16, no_masters, "use common.bf16=true"),
        ("--model-parallel-size", common.model_parallel_size > 1, in_parts, "use data parallelism"),
        ("--pipeline-model-parallel", distributed.pipeline_model_parallel, over_gpus, "use data parallelism"),
        ("--ascent-interval with --zero-sharding os", in_shards and reuses, component, "use one of them"),
        *(
            (f"{flag} with {other}", needed and given, reason, "use one of them")
            for flag, needed in needs_moments.items()
            for other, given, reason in without_moments
        ),
        ("--use-bmuf", cfg.optimization.use_bmuf, moves_weights, pytorch_ddp),
        (f"--ddp-backend {backend}", backend in backends, backends.get(backend), pytorch_ddp),
        (
            "--task online_backtranslation",
            cfg.task._name == "online_backtranslation",
            "its training targets are made by the model at w, and would change at w + epsilon",
            "use a task whose batches stay the same",
        ),
        (
            "--find-unused-parameters",
            distributed.find_unused_parameters
            and distributed.distributed_world_size > 1
            and backend in ("c10d", "pytorch_ddp")
            and cfg.optimizer.ascent_scope == "micro-batch"
            and (cfg.optimizer.fresh_masks or cfg.optimizer.ascent_fraction < 1.0),
            "torch's DistributedDataParallel fails if the pass at w + epsilon of a micro-batch uses other "
            "layers than its pass at w, as with --fresh-masks or --ascent-fraction it may",
            "use --ascent-scope update or --ddp-backend legacy_ddp",
        ),
        ("--quant-noise-pq", _quantization_noise(cfg.model) > 0, noised, "use --quant-noise-pq 0"),
    ]
    for flag, given, reason, alternative in refusals:
        if given:
            raise ValueError(
                f"{flag} does not go with --optimizer {cfg.optimizer._name}: {reason}; {alternative}"
            )


def _quantization_noise(model: Any) -> float:
    """Return the value of ``--quant-noise-pq``. Structured configurations have it in another place."""
    pq = getattr(model, "quant_noise_pq", None) or getattr(getattr(model, "quant_noise", None), "pq", None)
    return pq or 0.0


@contextlib.contextmanager
def _refusals_as_a_sentence() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"fairseq_asam: {error}") from None


def _checked_setup_task(setup_task):
    @functools.wraps(setup_task)
    def checked(cfg, **kwargs):
        # Do not check the configuration of a checkpoint: its data may be on another machine.
        whole = None if kwargs.get("from_checkpoint") else _sharpness_aware_configuration(cfg)
        if whole is not None:
            with _refusals_as_a_sentence():
                check_configuration(whole)
        return setup_task(cfg, **kwargs)

    return checked


def _sharpness_aware_configuration(task: Any) -> Any:
    """Return the whole configuration that *task* belongs to; ``None`` if its optimizer is not one of ours."""
    if isinstance(task, Namespace):
        ours = getattr(task, "optimizer", None) in SHARPNESS_AWARE
        return convert_namespace_to_omegaconf(task) if ours else None
    whole = task._get_root() if isinstance(task, DictConfig) else None
    return whole if getattr(getattr(whole, "optimizer", None), "_name", None) in SHARPNESS_AWARE else None


def count_updates(optimization: Any, batches: int | None) -> float:
    """Return how many updates a training makes; infinity if that is unknown.

    Args:
        optimization: that group of a fairseq configuration.
        batches: of an epoch, on each worker; ``None`` if that is unknown.
    """
    updates: float = math.inf
    if optimization.max_epoch and batches is not None:
        freq = optimization.update_freq  # by epoch; the last number holds for all later ones
        whole = math.floor if getattr(optimization, "skip_remainder_batch", False) else math.ceil
        of_epochs = (freq[min(epoch, len(freq) - 1)] for epoch in range(optimization.max_epoch))
        updates = sum(whole(batches / accumulated) for accumulated in of_epochs)
    return min(updates, optimization.max_update or math.inf)


def _make_task_sharpness_aware(trainer: Trainer) -> None:
    if not isinstance(trainer.task, SharpnessAwareTask):
        trainer.task.__class__ = with_sharpness_awareness(type(trainer.task))


def _set_first_ascent(trainer: Trainer, batches: int | None) -> None:
    """Tell the task when sharpness-aware updates begin, given the *batches* of an epoch."""
    updates = count_updates(trainer.cfg.optimization, batches)
    trainer.task.first_ascent = first_ascent(trainer.cfg.optimizer.ascent_from, updates)


def _sharpness_aware_get_train_iterator(get_train_iterator):
    # Change the task before it makes its batches: see checkpoints.py.
    @functools.wraps(get_train_iterator)
    def sharpness_aware_get_train_iterator(self, *args, **kwargs):
        if self.cfg.optimizer._name not in SHARPNESS_AWARE:
            return get_train_iterator(self, *args, **kwargs)
        _make_task_sharpness_aware(self)
        dataset = self.cfg.dataset
        if dataset.update_ordered_indices_seed:
            self.task.seed_of_batches = self.cfg.common.seed + 1
        batches = get_train_iterator(self, *args, **kwargs)
        if dataset.curriculum:
            # Otherwise fairseq keeps the order of the first epoch for all later ones, unless it resumes.
            batches.reuse_dataloader = False
        with _refusals_as_a_sentence():
            # Epochs that take turns with parts of the data have different numbers of batches.
            differ = self.task.has_sharded_data(dataset.train_subset)
            _set_first_ascent(self, None if differ else len(batches))
        return batches

    return sharpness_aware_get_train_iterator


def _sharpness_aware_train_step(train_step):
    @functools.wraps(train_step)
    def sharpness_aware_train_step(self, samples, raise_oom=False):
        asam = sharpness_aware_optimizer(self.optimizer)
        if asam is not None:
            # Leave out dummy batches, which are empty here, beside others: fairseq divides by the sentences
            # of all batches of a worker, or of none if the last one is a dummy.
            samples = [sample for sample in samples if sample] or samples
            _make_task_sharpness_aware(self)
            with _refusals_as_a_sentence():
                if self.task.first_ascent is None:  # the program makes batches without the Trainer
                    _set_first_ascent(self, None)
                asam.begin_update(self, len(samples))
        return train_step(self, samples, raise_oom)

    return sharpness_aware_train_step


@contextlib.contextmanager
def _no_sync_until_left(self: LegacyDistributedDataParallel) -> Iterator[None]:
    before, self.accumulate_grads = self.accumulate_grads, True
    try:
        yield
    finally:
        self.accumulate_grads = before


def _numpy_seed_under_lock(numpy_seed):
    # With --num-workers 0, a thread loads data while passes are made. Where it seeds numpy to draw noise, as
    # for masked language models, the pass at w + epsilon must not restore numpy's state in between.
    @functools.wraps(numpy_seed)
    @contextlib.contextmanager
    def numpy_seed_under_lock(*args, **kwargs):
        with RandomState.lock, numpy_seed(*args, **kwargs):
            yield

    return numpy_seed_under_lock


def _with_help_for_optimizers(parse_args_and_arch):
    # fairseq answers --help before it adds the options of the optimizer, so add them first.
    @functools.wraps(parse_args_and_arch)
    def with_help(parser, input_args=None, **kwargs):
        arguments = sys.argv[1:] if input_args is None else input_args
        if {"-h", "--help"} & set(arguments):
            for name in SHARPNESS_AWARE:
                if {name, f"--optimizer={name}"} & set(arguments):
                    OPTIMIZER_REGISTRY[name].add_args(parser.add_argument_group(f"--optimizer {name}"))
        return parse_args_and_arch(parser, input_args, **kwargs)

    return with_help


data_utils.numpy_seed = _numpy_seed_under_lock(data_utils.numpy_seed)
tasks.setup_task = _checked_setup_task(tasks.setup_task)
options.parse_args_and_arch = _with_help_for_optimizers(options.parse_args_and_arch)
# Change tasks in the Trainer, which meets every one. Subclasses made in advance would not reach them all:
# many tasks name their own class.
Trainer.get_train_iterator = _sharpness_aware_get_train_iterator(Trainer.get_train_iterator)
Trainer.train_step = _sharpness_aware_train_step(Trainer.train_step)
# fairseq's own no_sync stays in force after an exception, such as running out of memory.
LegacyDistributedDataParallel.no_sync = _no_sync_until_left
