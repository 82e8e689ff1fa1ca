"""Before fairseq trains: its ``--help``, and the refusal of what our optimizers cannot do."""

from __future__ import annotations

import contextlib
import functools
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.file_io import PathManager
from fairseq.optim import OPTIMIZER_REGISTRY
from omegaconf import DictConfig

from fairseq_asam.optim import SHARPNESS_AWARE, validate_config
from fairseq_asam.optim.options import direction_of, in_adams_metric
from fairseq_asam.sharpness import DIRECTIONS


class Refusal(NamedTuple):
    """What does not go with a sharpness-aware optimizer.

    Attributes:
        flag: what the user gave.
        is_given: returns whether a whole configuration has it.
        reason: why it does not go.
        alternative: what to do instead.
    """

    flag: str
    is_given: Callable[[Any], bool]
    reason: str
    alternative: str


def _in_shards(cfg: Any) -> bool:
    return cfg.distributed_training.zero_sharding != "none"


def _with_scaled_moments(cfg: Any) -> bool:
    return getattr(cfg.optimizer, "fp16_adam_stats", False)


def _loads_with_the_masks_generator(cfg: Any) -> bool:
    return (
        cfg.task._name in ("denoising", "multilingual_denoising")
        and cfg.dataset.num_workers == 0
        and cfg.dataset.data_buffer_size > 0
        and direction_of(cfg.optimizer).needs_pass_at_w
        and not cfg.optimizer.fresh_masks
    )


def _passes_use_other_layers(cfg: Any) -> bool:
    distributed, optimizer = cfg.distributed_training, cfg.optimizer
    return (
        distributed.find_unused_parameters
        and distributed.distributed_world_size > 1
        and distributed.ddp_backend in ("c10d", "pytorch_ddp")
        and optimizer.ascent_scope == "micro-batch"
        and (optimizer.fresh_masks or optimizer.ascent_fraction < 1.0)
    )


def _workers_have_experts(cfg: Any) -> bool:
    experts = getattr(cfg.model, "base_layers", None) or 0
    return experts > 0 and cfg.distributed_training.distributed_world_size > 1


def _quantization_noise(cfg: Any) -> float:
    # Structured configurations have it in another place.
    model = cfg.model
    pq = getattr(model, "quant_noise_pq", None) or getattr(getattr(model, "quant_noise", None), "pq", None)
    return pq or 0.0


def _both(first: Callable[[Any], bool], second: Callable[[Any], bool], cfg: Any) -> bool:
    return first(cfg) and second(cfg)


_OF_THE_STATE = " or ".join(name for name, each in DIRECTIONS.items() if each.needs_optimizer)
#: The flags with which epsilon is made of the state of the optimizer.
_NEED_THE_STATE: dict[str, Callable[[Any], bool]] = {
    f"--ascent-direction {_OF_THE_STATE}": lambda cfg: direction_of(cfg.optimizer).needs_optimizer,
    "--normalization adam": lambda cfg: in_adams_metric(cfg.optimizer),
}
_NO_MASTERS = "half-precision weights without float32 masters absorb epsilon"
_MOVES_WEIGHTS = "it moves weights between the steps of the optimizer"
_PART_OF_STATE = "a worker has the optimizer's state of its part of the weights only"
_SCALED_MOMENTS = "each weight's moment then has a scale of its own"
_ONE_OF_THEM = "use one of them"

#: The first one that is given is told.
REFUSALS = [
    Refusal(
        "--bf16",
        lambda cfg: cfg.common.bf16 and cfg.common.tpu,
        "fairseq-train takes it for a TPU",
        "use fairseq-hydra-train with common.bf16=true, or --fp16",
    ),
    Refusal("--tpu", lambda cfg: cfg.common.tpu, "it has not been tried there", "use GPUs or CPUs"),
    Refusal(
        "--memory-efficient-fp16",
        lambda cfg: cfg.common.memory_efficient_fp16,
        _NO_MASTERS,
        "use --fp16",
    ),
    Refusal(
        "--memory-efficient-bf16",
        lambda cfg: cfg.common.memory_efficient_bf16,
        _NO_MASTERS,
        "use common.bf16=true",
    ),
    Refusal(
        "--model-parallel-size",
        lambda cfg: cfg.common.model_parallel_size > 1,
        "each worker sees only a part of the weights, and epsilon needs the norm over all",
        "use data parallelism",
    ),
    Refusal(
        "--pipeline-model-parallel",
        lambda cfg: cfg.distributed_training.pipeline_model_parallel,
        "it spreads a worker's weights over several GPUs, where epsilon has not been tried",
        "use data parallelism",
    ),
    Refusal(
        "--base-layers",
        _workers_have_experts,
        "each worker has experts of its own, and epsilon needs the norm over all",
        "use one worker or --base-layers 0",
    ),
    Refusal(
        "--ascent-interval with --zero-sharding os",
        lambda cfg: cfg.optimizer.ascent_interval > 1 and _in_shards(cfg),
        "the component that it reuses would have to be shared out like the optimizer's state",
        _ONE_OF_THEM,
    ),
    *(
        Refusal(
            f"{flag} with {other}", functools.partial(_both, needs_state, changes_state), reason, _ONE_OF_THEM
        )
        for flag, needs_state in _NEED_THE_STATE.items()
        for other, changes_state, reason in (
            ("--zero-sharding os", _in_shards, _PART_OF_STATE),
            ("--fp16-adam-stats", _with_scaled_moments, _SCALED_MOMENTS),
        )
    ),
    Refusal(
        "--use-bmuf",
        lambda cfg: cfg.optimization.use_bmuf,
        _MOVES_WEIGHTS,
        "use --ddp-backend pytorch_ddp",
    ),
    Refusal(
        "--ddp-backend slowmo",
        lambda cfg: cfg.distributed_training.ddp_backend == "slowmo",
        _MOVES_WEIGHTS,
        "use --ddp-backend pytorch_ddp",
    ),
    Refusal(
        "--ddp-backend fully_sharded",
        lambda cfg: cfg.distributed_training.ddp_backend == "fully_sharded",
        "fairscale's FSDP runs on GPUs only, and hides the names and shapes of weights",
        "use --ddp-backend pytorch_ddp",
    ),
    Refusal(
        "--task online_backtranslation",
        lambda cfg: cfg.task._name == "online_backtranslation",
        "its training targets are made by the model at w, and would change at w + epsilon",
        "use a task whose batches stay the same",
    ),
    Refusal(
        "--num-workers 0 with a denoising task",
        _loads_with_the_masks_generator,
        "a thread that loads data during the passes draws its noise from the generator of the dropout masks, "
        "which would differ between the passes",
        "use --num-workers 1 or --data-buffer-size 0",
    ),
    Refusal(
        "--find-unused-parameters",
        _passes_use_other_layers,
        "torch's DistributedDataParallel fails if the pass at w + epsilon of a micro-batch uses other layers "
        "than its pass at w, as with --fresh-masks or --ascent-fraction it may",
        "use --ascent-scope update or --ddp-backend legacy_ddp",
    ),
    Refusal(
        "--quant-noise-pq",
        lambda cfg: _quantization_noise(cfg) > 0,
        "each forward pass overwrites the weights with noised ones, at w + epsilon too",
        "use --quant-noise-pq 0",
    ),
]


def check_configuration(cfg: Any) -> None:
    """Check a whole fairseq configuration whose optimizer is sharpness-aware.

    Raises:
        ValueError: an option is out of range, the configuration has one of :data:`REFUSALS`, or it names
            data that do not exist.
    """
    validate_config(cfg.optimizer)
    data = getattr(cfg.task, "data", None)  # some tasks have no such option, and some need no data
    for path in utils.split_paths(data or ""):
        if path and not PathManager.exists(path):
            raise ValueError(f"there is no data in {path}: name the data of --task {cfg.task._name}")
    for refusal in REFUSALS:
        if refusal.is_given(cfg):
            raise ValueError(
                f"{refusal.flag} does not go with --optimizer {cfg.optimizer._name}: {refusal.reason}; "
                f"{refusal.alternative}"
            )


@contextlib.contextmanager
def refusals_as_a_sentence() -> Iterator[None]:
    """Within the block, let a ValueError end the program with its sentence alone."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"fairseq_asam: {error}") from None


def with_check_of_the_configuration(setup_task):
    """Return fairseq's ``setup_task``, which first checks the configuration that the task belongs to."""

    @functools.wraps(setup_task)
    def setup_checked_task(cfg, **kwargs):
        # Do not check the configuration of a checkpoint: its data may be on another machine.
        whole = None if kwargs.get("from_checkpoint") else _sharpness_aware_configuration(cfg)
        if whole is not None:
            with refusals_as_a_sentence():
                check_configuration(whole)
        return setup_task(cfg, **kwargs)

    return setup_checked_task


def _sharpness_aware_configuration(task: Any) -> Any:
    """Return the whole configuration that *task* belongs to; ``None`` if its optimizer is not one of ours."""
    if isinstance(task, Namespace):
        ours = getattr(task, "optimizer", None) in SHARPNESS_AWARE
        return convert_namespace_to_omegaconf(task) if ours else None
    whole = task._get_root() if isinstance(task, DictConfig) else None
    return whole if getattr(getattr(whole, "optimizer", None), "_name", None) in SHARPNESS_AWARE else None


def with_help_for_optimizers(parse_args_and_arch):
    """Return ``parse_args_and_arch``, whose ``--help`` lists the options of our optimizers too."""

    @functools.wraps(parse_args_and_arch)
    def with_help(parser, input_args=None, **kwargs):
        arguments = sys.argv[1:] if input_args is None else input_args
        if {"-h", "--help"} & set(arguments):
            for name in SHARPNESS_AWARE:
                if {name, f"--optimizer={name}"} & set(arguments):
                    OPTIMIZER_REGISTRY[name].add_args(parser.add_argument_group(f"--optimizer {name}"))
        return parse_args_and_arch(parser, input_args, **kwargs)

    return with_help
