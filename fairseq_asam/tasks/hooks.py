"""Where the plugin meets fairseq: what it puts in place of fairseq's own when it is imported."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.optim import OPTIMIZER_REGISTRY
from fairseq.trainer import Trainer

from fairseq_asam.optim import OPTIMIZERS, sharpness_aware_optimizer, validate_config

from .sharpness_aware import SharpnessAwareTask, with_sharpness_awareness


def check_configuration(cfg: Any) -> None:
    """Raise ValueError, in one sentence, if *cfg*, a whole fairseq configuration, asks a sharpness-aware
    optimizer for something that it cannot do, or names data that are not there."""
    validate_config(cfg.optimizer)
    for path in utils.split_paths(getattr(cfg.task, "data", None) or ""):
        if not os.path.exists(path):
            raise ValueError(f"there is no data in {path}: name a directory that fairseq-preprocess wrote")
    common, distributed = cfg.common, cfg.distributed_training
    no_masters = "half-precision weights without float32 masters absorb epsilon"
    moves_weights = "it moves weights between the steps of the optimizer"
    in_parts = "each worker sees only a part of the weights, and epsilon needs the norm over all"
    backends = {"fully_sharded": in_parts, "slowmo": moves_weights}
    refusals = [
        (
            "--bf16",
            common.bf16 and common.tpu,
            "fairseq-train takes it for a TPU",
            "use fairseq-hydra-train with common.bf16=true, or --fp16",
        ),
        ("--tpu", common.tpu, "it has not been tried there", "use GPUs or CPUs"),
        ("--memory-efficient-fp16", common.memory_efficient_fp16, no_masters, "use --fp16"),
        ("--memory-efficient-bf16", common.memory_efficient_bf16, no_masters, "use common.bf16=true"),
        ("--model-parallel-size", common.model_parallel_size > 1, in_parts, "use data parallelism"),
        ("--pipeline-model-parallel", distributed.pipeline_model_parallel, in_parts, "use data parallelism"),
        ("--zero-sharding", distributed.zero_sharding != "none", in_parts, "use --zero-sharding none"),
        ("--use-bmuf", cfg.optimization.use_bmuf, moves_weights, "use --ddp-backend pytorch_ddp"),
        (
            f"--ddp-backend {distributed.ddp_backend}",
            distributed.ddp_backend in backends,
            backends.get(distributed.ddp_backend),
            "use --ddp-backend pytorch_ddp",
        ),
        (
            "--task online_backtranslation",
            cfg.task._name == "online_backtranslation",
            "its training targets are made by the model at w, and would change at w + epsilon",
            "use a task whose batches stay the same",
        ),
    ]
    for flag, given, reason, alternative in refusals:
        if given:
            raise ValueError(
                f"{flag} does not go with --optimizer {cfg.optimizer._name}: {reason}; {alternative}"
            )


def _checked_setup_task(setup_task):
    @functools.wraps(setup_task)
    def checked(cfg, **kwargs):
        whole = convert_namespace_to_omegaconf(cfg) if isinstance(cfg, Namespace) else cfg._get_root()
        if getattr(whole.get("optimizer"), "_name", None) in OPTIMIZERS:
            try:
                check_configuration(whole)
            except ValueError as error:
                raise SystemExit(f"fairseq_asam: {error}") from None
        return setup_task(cfg, **kwargs)

    return checked


def _sharpness_aware_train_step(train_step):
    @functools.wraps(train_step)
    def sharpness_aware_train_step(self, samples, raise_oom=False):
        asam = sharpness_aware_optimizer(self.optimizer)
        if asam is not None:
            if not isinstance(self.task, SharpnessAwareTask):
                self.task.__class__ = with_sharpness_awareness(type(self.task))
            asam.begin_update(self.get_num_updates())
            self.task.begin_update(len(samples))
        return train_step(self, samples, raise_oom)

    return sharpness_aware_train_step


@contextlib.contextmanager
def _no_sync_until_left(self: LegacyDistributedDataParallel) -> Iterator[None]:
    before, self.accumulate_grads = self.accumulate_grads, True
    try:
        yield
    finally:
        self.accumulate_grads = before


def _with_help_for_optimizers(parse_args_and_arch):
    # fairseq answers --help before it has added the options of the optimizer.
    @functools.wraps(parse_args_and_arch)
    def with_help(parser, input_args=None, **kwargs):
        arguments = sys.argv[1:] if input_args is None else input_args
        if {"-h", "--help"} & set(arguments):
            for name in OPTIMIZERS:
                if name in arguments:
                    OPTIMIZER_REGISTRY[name].add_args(parser.add_argument_group(f"--optimizer {name}"))
        return parse_args_and_arch(parser, input_args, **kwargs)

    return with_help


tasks.setup_task = _checked_setup_task(tasks.setup_task)
options.parse_args_and_arch = _with_help_for_optimizers(options.parse_args_and_arch)
# fairseq has too many tasks, too many of which name their own class, for a registry of subclasses to
# reach them all. The Trainer meets every one.
Trainer.train_step = _sharpness_aware_train_step(Trainer.train_step)
# fairseq's own stays in force after an exception, such as running out of memory.
LegacyDistributedDataParallel.no_sync = _no_sync_until_left
