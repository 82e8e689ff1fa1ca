"""``--optimizer asam`` and ``sam``: fairseq optimizers that step with the gradient at w + epsilon.

:mod:`fairseq_asam.tasks.train_step` makes the passes at w and at w + epsilon.
"""

from __future__ import annotations

import functools
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY as DATACLASSES
from fairseq.optim import OPTIMIZER_REGISTRY, FairseqOptimizer, register_optimizer
from fairseq.trainer import Trainer

from fairseq_asam.sharpness import SELECTIONS, Perturbation, TwoPasses, selected_parameters
from fairseq_asam.sharpness.moments import adam_diagonals, second_moments

from .half_precision import master_weights, of_model_parameters
from .looksam import LookSAM, drop_components
from .options import ASAMConfig, SAMConfig, direction_of, in_adams_metric, region, validate_config


@dataclass
class Update:
    """One update, from its first micro-batch to its step.

    Attributes:
        two_passes: makes the passes.
        num_micro_batches: how many micro-batches the update has on this worker.
        ascends: whether it makes both passes; otherwise one.
        looksam: reuses what an earlier update found if this one does not ascend; ``None`` without
            ``--ascent-interval`` and before ``--ascent-from``.
        micro_batch: the number of the present micro-batch, from 1 on; 0 before the first.
        waiting: the micro-batches whose pass at w + epsilon is still to be made.
        has_failed: whether a pass ran out of memory. fairseq clears the gradients of each micro-batch then.
    """

    two_passes: TwoPasses
    num_micro_batches: int
    ascends: bool
    looksam: LookSAM | None = None
    micro_batch: int = 0
    waiting: list[Any] = field(default_factory=list)
    has_failed: bool = False

    def next_micro_batch(self) -> None:
        """Go to the next micro-batch. The first follows the last: fairseq repeats an update to find a NaN."""
        self.micro_batch = self.micro_batch % self.num_micro_batches + 1

    @property
    def is_at_last(self) -> bool:
        """Whether the present micro-batch is the last one."""
        return self.micro_batch == self.num_micro_batches


class SharpnessAwareOptimizer(FairseqOptimizer):
    """What ``asam`` and ``sam`` add to the fairseq optimizer that they extend.

    fairseq's Trainer calls :meth:`begin_update`, the task's ``train_step`` for each micro-batch,
    :meth:`clip_grad_norm` and :meth:`step`.

    Attributes:
        looksam: what ``--ascent-interval`` keeps and reuses; ``None`` without.
        update: the present one; ``None`` after the step.
    """

    sharpness_options: type

    def __init__(self, cfg, params):
        validate_config(cfg)
        super().__init__(cfg, params)
        self.sharpness_config = cfg
        self.looksam: LookSAM | None = None
        if cfg.ascent_interval > 1:
            per_worker = cfg.ascent_scope == "micro-batch"
            self.looksam = LookSAM(self.optimizer, cfg.ascent_interval, cfg.ascent_reuse, per_worker)
        self.update: Update | None = None
        self._two_passes: TwoPasses | None = None
        # Functions that return the moments of which epsilon is made, while the base optimizer has none yet.
        self._missing_moments: list[Callable] = []
        if direction_of(cfg).needs_optimizer:
            self._missing_moments.append(direction_of(cfg).kept_by)
        if in_adams_metric(cfg):
            self._missing_moments.append(second_moments)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the options of the base optimizer, and then ours."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, cls.sharpness_options())

    def two_passes(self, trainer: Trainer) -> TwoPasses:
        """Return what makes the passes over the model and the criterion of *trainer*.

        It is made once: fairseq builds a new optimizer when the parameters change.

        Raises:
            ValueError: the model has no weights of the kind that ``--perturbed-weights`` names.
        """
        if self._two_passes is None:
            cfg, modules = self.sharpness_config, [trainer.model, trainer.criterion]
            selection = str(cfg.perturbed_weights)
            selected = [pair for module in modules for pair in selected_parameters(module, selection)]
            if not any(weight.requires_grad for _, weight in selected):
                raise ValueError(
                    f"--perturbed-weights is {selection}, but the model trains no such weights: choose "
                    f"{' or '.join(name for name in SELECTIONS if name != selection)}"
                )
            direction = direction_of(cfg)(
                trainer.optimizer,
                of_weights=of_model_parameters,
                seed=trainer.cfg.common.seed,
                number=trainer.get_num_updates,
            )
            diagonals = functools.partial(of_model_parameters, adam_diagonals, trainer.optimizer)
            perturbation = Perturbation(
                selected,
                **region(cfg),
                normalize_bias=getattr(cfg, "normalize_bias", False),
                masters=master_weights(trainer.optimizer),
                direction=direction,
                diagonals=diagonals if in_adams_metric(cfg) else None,
            )
            self._two_passes = TwoPasses(perturbation, modules, fresh_masks=cfg.fresh_masks)
        return self._two_passes

    def begin_update(self, trainer: Trainer, num_micro_batches: int) -> None:
        """Begin an update of *num_micro_batches*, even if the last one has not ended.

        Raises:
            ValueError: see :meth:`two_passes`; or the base optimizer does not keep the moments of which
                ``--ascent-direction`` or ``--normalization adam`` makes epsilon.
        """
        two_passes, number = self.two_passes(trainer), trainer.get_num_updates()
        two_passes.reset()
        # Ask for moments now, where an error becomes a sentence, until there are some.
        self._missing_moments = [each for each in self._missing_moments if not each(self.optimizer)]
        self.update = Update(two_passes, num_micro_batches, ascends=number >= trainer.task.first_ascent)
        if self.update.ascends and self.looksam is not None:
            self.update.looksam = self.looksam
            self.update.ascends = self.looksam.begin(number)

    def clip_grad_norm(self, max_norm, aggregate_norm_fn=None):
        """Let LookSAM add what it reuses to the gradient, then clip the gradient's norm."""
        looksam = self.update and self.update.looksam
        if looksam:
            if self.update.ascends:
                looksam.find_component()
            else:
                looksam.add_component()
        return super().clip_grad_norm(max_norm, aggregate_norm_fn)

    def step(self, *args, **kwargs):
        """Step at w, once per update.

        Raises:
            RuntimeError: no update has begun since the last step, or some of its passes are missing.
        """
        if self.update is None or not self.update.is_at_last:
            raise RuntimeError(
                f"--optimizer {self.sharpness_config._name} would step without a pass at w + epsilon, which "
                "would be a plain step of its base optimizer: train with fairseq's Trainer, which this "
                "plugin extends"
            )
        super().step(*args, **kwargs)
        if self.update.looksam is not None:
            self.update.looksam.store_component()
        self.update = None

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        """Load a state of this optimizer or its base."""
        if self.looksam is None:
            # Drop them here: with --zero-sharding, the optimizer's own state is only a part of it.
            drop_components(state_dict)
        super().load_state_dict(state_dict, optimizer_overrides)


def sharpness_aware_optimizer(optimizer: FairseqOptimizer) -> SharpnessAwareOptimizer | None:
    """Return the sharpness-aware optimizer that *optimizer* is or wraps; ``None`` if there is none."""
    optimizer = getattr(optimizer, "fp32_optimizer", optimizer)
    return optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else None


def _register(name: str, options: type, base_name: str) -> None:
    base, base_config = OPTIMIZER_REGISTRY[base_name], DATACLASSES.get(base_name)
    namespace = {"__doc__": base.__doc__, "sharpness_options": options}
    optimizer = type(f"{name}_{base.__name__}", (SharpnessAwareOptimizer, base), namespace)
    # Older optimizers of fairseq have no dataclass, and take the parsed arguments as they are.
    config: type | None = None
    if base_config is not None:
        config = dataclass(type(f"{options.__name__}_{base_config.__name__}", (options, base_config), {}))
    register_optimizer(name, dataclass=config)(optimizer)
    # fairseq resumes only into an optimizer whose class has the name that is in the checkpoint. The state is
    # the base's own, so a run may go on with or without sharpness awareness.
    optimizer.__name__ = base.__name__
    SHARPNESS_AWARE.append(name)


#: The values of ``--optimizer`` that this package adds: ``asam`` and ``sam`` extend Adam, ``asam_sgd`` and
#: so on the optimizer they name.
SHARPNESS_AWARE: list[str] = []
for _options, _name in ((ASAMConfig, "asam"), (SAMConfig, "sam")):
    _register(_name, _options, "adam")
    # composite and cpu_adam are missing: they keep parameters or steps where step() cannot reach them.
    for _base in ("adadelta", "adafactor", "adagrad", "adamax", "lamb", "nag", "sgd"):
        _register(f"{_name}_{_base}", _options, _base)
