"""``--optimizer asam`` and ``--optimizer sam``: fairseq optimizers that know how to perturb their weights.

The passes at w and at w + epsilon are made in :mod:`fairseq_asam.tasks.sharpness_aware`.
"""

import math
from argparse import ArgumentParser
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.optim import (
    OPTIMIZER_DATACLASS_REGISTRY,
    OPTIMIZER_REGISTRY,
    FairseqOptimizer,
    FP16Optimizer,
    register_optimizer,
)
from torch import Tensor
from torch.nn import Module

from fairseq_asam.sharpness import NORMALIZATIONS, SELECTIONS, Perturbation, TwoPasses, selected_parameters
from fairseq_asam.sharpness.perturbation import validate
from fairseq_asam.sharpness.reuse import add_component_, orthogonal_component_

# No "from __future__ import annotations" here: fairseq's parser needs types, not their names.

# What --ascent-interval keeps of each weight in the optimizer's state, and so in checkpoints, and the number
# of updates before the one that it is from.
COMPONENT, COMPONENT_UPDATE = "ascent_component", "ascent_update"


@dataclass
class SAMConfig(FairseqDataclass):
    """The options of ``--optimizer sam``, beside those of the base optimizer."""

    rho: float = field(
        default=0.1,
        metadata={"help": "radius of the maximization region (Equation 2; Section 5.3: 0.1 for translation)"},
    )
    p_norm: float = field(
        default=2.0,
        metadata={"help": "norm that bounds the region, 1 < p <= inf (Equation 3; Section 5.2 finds 2 best)"},
    )
    ascent_scope: ChoiceEnum(["update", "micro-batch"]) = field(  # type: ignore[valid-type]
        default="update",
        metadata={
            "help": "whose gradient makes epsilon: of the whole update, over all accumulated micro-batches "
            "and all workers (Algorithm 1), or of each micro-batch of each worker on its own (m-sharpness, "
            "Section 5.2)"
        },
    )
    perturbed_weights: ChoiceEnum(list(SELECTIONS)) = field(  # type: ignore[valid-type]
        default="all",
        metadata={
            "help": "which weights epsilon moves (the paper: all; arXiv 2306.04226: normalization-layers)"
        },
    )
    fresh_masks: bool = field(
        default=False,
        metadata={
            "help": "draw new dropout masks for the pass at w + epsilon; by default both passes draw the "
            "same, so that they see one loss L_B (Algorithm 1)"
        },
    )
    ascent_fraction: float = field(
        default=1.0,
        metadata={
            "help": "share of the sentences of each batch, drawn at random, whose gradient makes epsilon, in "
            "(0, 1]; an update costs 1 + this many passes (arXiv 2110.08529)"
        },
    )
    ascent_interval: int = field(
        default=1,
        metadata={
            "help": "make both passes in every N-th update only, and in between reuse what they found, "
            "as LookSAM does (arXiv 2203.02714)"
        },
    )
    ascent_reuse: Optional[float] = field(
        default=None,
        metadata={
            "help": "with --ascent-interval, alpha, the weight of the reused component (LookSAM: 0.7); by "
            "default its own, the tangent of the angle between the gradients at w and w + epsilon, at most 1"
        },
    )


@dataclass
class ASAMConfig(SAMConfig):
    """The options of ``--optimizer asam``, beside those of the base optimizer."""

    rho: float = field(
        default=0.2,
        metadata={"help": "radius of the maximization region (Equation 4; Section 5.3: 0.2 for translation)"},
    )
    eta: float = field(
        default=0.01,
        metadata={"help": "stability term added to the normalization operator (Section 3, Equation 5)"},
    )
    normalization: ChoiceEnum(list(NORMALIZATIONS)) = field(  # type: ignore[valid-type]
        default="element-wise",
        metadata={"help": "normalization operator T_w (Section 3, Equation 5; none is SAM)"},
    )
    normalize_bias: bool = field(
        default=False,
        metadata={"help": "normalize biases too (Section 3; Figure 4 shows no gain from it)"},
    )


class SharpnessAwareOptimizer(FairseqOptimizer):
    """What ``asam`` and ``sam`` add to the fairseq optimizer that they extend."""

    sharpness_options: type

    def __init__(self, cfg, params):
        validate_config(cfg)
        super().__init__(cfg, params)
        self.sharpness_config = cfg
        self._two_passes: Optional[TwoPasses] = None
        self.begin_update(0)

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the options of the base optimizer, and then ours."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, cls.sharpness_options())

    def two_passes(self, model: Module, criterion: Module, optimizer: FairseqOptimizer) -> TwoPasses:
        """Return what makes the passes with the weights that *optimizer*, which is or wraps this one, trains.
        It is made once: fairseq builds a new optimizer when the parameters change.

        Raises:
            ValueError: the model has no weights of the kind that ``--perturbed-weights`` names.
        """
        if self._two_passes is None:
            cfg = self.sharpness_config
            selection = str(cfg.perturbed_weights)
            selected = [pair for part in (model, criterion) for pair in selected_parameters(part, selection)]
            if not any(weight.requires_grad for _, weight in selected):
                raise ValueError(
                    f"--perturbed-weights is {selection}, but the model trains no such weights: choose "
                    f"{' or '.join(name for name in SELECTIONS if name != selection)}"
                )
            perturbation = Perturbation(
                selected,
                **_region(cfg),
                normalize_bias=getattr(cfg, "normalize_bias", False),
                masters=master_weights(optimizer),
            )
            self._two_passes = TwoPasses(perturbation, [model, criterion], fresh_masks=cfg.fresh_masks)
        return self._two_passes

    def begin_update(self, num_updates: int) -> None:
        """Begin the update after *num_updates*, whatever became of the last one.

        :attr:`ascends` then says whether it makes both passes: with ``--ascent-interval``, every so many do,
        and the first one that has no component to reuse. :attr:`ascended` is for the passes to tell that
        they were made.
        """
        self._num_updates = num_updates
        self.ascended = False
        if self._two_passes is not None:
            self._two_passes.reset()
        # The gradient at w, and then its reusable component.
        self._component: Optional[list[Tensor]] = None
        self.ascends = num_updates % self.sharpness_config.ascent_interval == 0 or not any(
            self._reusable(p) for p in self.params
        )

    def _reusable(self, parameter: Tensor) -> bool:
        """Whether a component is kept of *parameter*, and not from before the last interval: a run may have
        gone on without them in between."""
        state = self.optimizer.state.get(parameter, {})
        age = self._num_updates - state.get(COMPONENT_UPDATE, -math.inf)
        return COMPONENT in state and age < self.sharpness_config.ascent_interval

    def load_state_dict(self, state_dict, optimizer_overrides=None):
        """Load a state of this optimizer or its base, less the components that would not be reused."""
        if self.sharpness_config.ascent_interval == 1:
            # Not out of the optimizer's state, of which sharding makes a part for each worker.
            for state in state_dict["state"].values():
                state.pop(COMPONENT, None)
                state.pop(COMPONENT_UPDATE, None)
        super().load_state_dict(state_dict, optimizer_overrides)

    @property
    def has_noted_gradient(self) -> bool:
        """Whether :meth:`note_gradient` was called in this update, with ``--ascent-interval``."""
        return self._component is not None

    def note_gradient(self, optimizer: FairseqOptimizer) -> None:
        """With ``--ascent-interval``, add the model's present gradients to the update's gradient at w."""
        if self.sharpness_config.ascent_interval == 1:
            return
        if self._component is None:
            used = [self.optimizer.state.get(p, {}).pop(COMPONENT, None) for p in self.params]
            self._component = [
                torch.zeros_like(p, requires_grad=False) if buffer is None else buffer.zero_()
                for p, buffer in zip(self.params, used)
            ]
        for total, p in zip(views(optimizer, self._component), model_parameters(optimizer)):
            if p.grad is not None:
                total += p.grad

    def clip_grad_norm(self, max_norm, aggregate_norm_fn=None):
        """Clip the norm of the gradient, to which, in an update without a pass at w + epsilon, the component
        of an earlier one is added first."""
        if self.sharpness_config.ascent_interval > 1:
            self._keep_or_reuse_component()
        return super().clip_grad_norm(max_norm, aggregate_norm_fn)

    @torch.no_grad()
    def _keep_or_reuse_component(self) -> None:
        if not self.ascends:
            reusable = [p for p in self.params if p.grad is not None and self._reusable(p)]
            if reusable:
                component = [self.optimizer.state[p][COMPONENT] for p in reusable]
                add_component_([p.grad for p in reusable], component, self.sharpness_config.ascent_reuse)
            self.ascended = True
            return
        workers = distributed_utils.get_data_parallel_group()
        if (
            self.sharpness_config.ascent_scope == "micro-batch"
            and distributed_utils.get_world_size(workers) > 1
        ):
            for gradient in self._component:
                distributed_utils.all_reduce(gradient, workers)
        perturbed = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        orthogonal_component_(self._component, perturbed)

    def step(self, *args, **kwargs):
        """Step at w, once per pass at w + epsilon or, with ``--ascent-interval``, component reused.

        Raises:
            RuntimeError: there was no such pass since the last step.
        """
        if not self.ascended:
            raise RuntimeError(
                f"--optimizer {self.sharpness_config._name} was to step without a pass at w + epsilon, which "
                "would be a plain step of its base optimizer: train with fairseq's Trainer, which this "
                "plugin extends"
            )
        self.ascended = False
        super().step(*args, **kwargs)
        if self._component is not None:
            # Only now, and only of the weights stepped (layer drop leaves some out): Adam and others take a
            # state that is not empty for one of theirs.
            for p, component in zip(self.params, self._component):
                if p.grad is not None:
                    self.optimizer.state[p].update(
                        {COMPONENT: component, COMPONENT_UPDATE: self._num_updates}
                    )
            self._component = None


def sharpness_aware_optimizer(optimizer: FairseqOptimizer) -> Optional[SharpnessAwareOptimizer]:
    """Return the sharpness-aware optimizer that *optimizer* is or wraps, or ``None``."""
    optimizer = getattr(optimizer, "fp32_optimizer", optimizer)
    return optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else None


def model_parameters(optimizer: FairseqOptimizer) -> list[Tensor]:
    """Return the parameters whose gradient *optimizer*, or what it wraps, steps with."""
    return optimizer.fp16_params if isinstance(optimizer, FP16Optimizer) else list(optimizer.params)


def master_weights(optimizer: FairseqOptimizer) -> dict[Tensor, Tensor]:
    """Return the float32 master of each half-precision parameter; with ``--fp16``, views of its buffers."""
    if not isinstance(optimizer, FP16Optimizer):
        return {}
    masters = [master.detach() for master in optimizer.fp32_optimizer.params]
    return dict(zip(optimizer.fp16_params, views(optimizer, masters)))


def views(optimizer: FairseqOptimizer, tensors: list[Tensor]) -> list[Tensor]:
    """Return *tensors*, in the form of the parameters that the base optimizer steps, in that of the model's:
    ``--fp16`` makes one flat buffer of them."""
    if not isinstance(optimizer, FP16Optimizer) or not optimizer.has_flat_params:
        return tensors
    (flat,) = tensors
    parts = flat.split([p.numel() for p in optimizer.fp16_params])
    return [part.view_as(p) for part, p in zip(parts, optimizer.fp16_params)]


def validate_config(cfg: Any) -> None:
    """Raise ValueError, in one sentence, if an option of *cfg* is out of range."""
    validate(**_region(cfg))
    fraction, interval, reuse = cfg.ascent_fraction, cfg.ascent_interval, cfg.ascent_reuse
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"--ascent-fraction is {fraction}, but it must be greater than 0 and at most 1")
    if interval < 1:
        raise ValueError(f"--ascent-interval is {interval}, but it must be at least 1 (LookSAM: 5)")
    if reuse is not None and not 0.0 <= reuse < math.inf:
        raise ValueError(f"--ascent-reuse is {reuse}, but it must be a finite number >= 0 (LookSAM: 0.7)")
    if fraction < 1.0 and interval > 1:
        raise ValueError(
            "--ascent-fraction does not go with --ascent-interval: what LookSAM reuses is the difference of "
            "two gradients of the same sentences; use one of them"
        )


def _region(cfg: Any) -> dict[str, Any]:
    """The maximization region that *cfg* describes, as :class:`Perturbation` names it; ``sam`` has T = 1."""
    return {
        "rho": cfg.rho,
        "p": cfg.p_norm,
        "eta": getattr(cfg, "eta", 0.0),
        "normalization": str(getattr(cfg, "normalization", "none")),
    }


def _register(name: str, options: type, base_name: str) -> None:
    base, base_config = OPTIMIZER_REGISTRY[base_name], OPTIMIZER_DATACLASS_REGISTRY.get(base_name)
    namespace = {"__doc__": base.__doc__, "sharpness_options": options}
    optimizer = type(f"{name}_{base.__name__}", (SharpnessAwareOptimizer, base), namespace)
    # Older optimizers of fairseq have none, and take the parsed arguments as they are.
    config: Optional[type] = None
    if base_config is not None:
        config = dataclass(type(f"{options.__name__}_{base_config.__name__}", (options, base_config), {}))
    register_optimizer(name, dataclass=config)(optimizer)
    # fairseq resumes only into an optimizer whose class has the name in the checkpoint. The state is the
    # base's own, so that runs may go on with or without sharpness awareness.
    optimizer.__name__ = base.__name__
    OPTIMIZERS.append(name)


#: The values of ``--optimizer`` that this package adds: ``asam`` and ``sam`` extend Adam, ``asam_sgd`` and
#: so on the optimizer they name.
OPTIMIZERS: list[str] = []
for _options, _name in ((ASAMConfig, "asam"), (SAMConfig, "sam")):
    _register(_name, _options, "adam")
    # composite and cpu_adam keep parameters or steps where this step could not reach them.
    for _base in ("adadelta", "adafactor", "adagrad", "adamax", "lamb", "nag", "sgd"):
        _register(f"{_name}_{_base}", _options, _base)
