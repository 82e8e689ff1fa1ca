"""``--optimizer asam`` and ``--optimizer sam``: fairseq optimizers that know how to perturb their weights.

The passes at w and at w + epsilon are made in :mod:`fairseq_asam.tasks.sharpness_aware`.
"""

from argparse import ArgumentParser
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.optim import (
    OPTIMIZER_DATACLASS_REGISTRY,
    OPTIMIZER_REGISTRY,
    FairseqOptimizer,
    FP16Optimizer,
    register_optimizer,
)
from torch import Tensor
from torch.nn import Module

from fairseq_asam.sharpness import NORMALIZATIONS, SELECTIONS, Perturbation, selected_parameters
from fairseq_asam.sharpness.perturbation import validate

# No "from __future__ import annotations" here: fairseq's parser needs types, not their names.


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
    ascent_scope: ChoiceEnum(["update", "micro-batch"]) = field(
        default="update",
        metadata={
            "help": "whose gradient makes epsilon: of the whole update, over all accumulated micro-batches "
            "and all workers (Algorithm 1), or of each micro-batch of each worker on its own (m-sharpness, "
            "Section 5.2)"
        },
    )
    perturbed_weights: ChoiceEnum(list(SELECTIONS)) = field(
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
    normalization: ChoiceEnum(list(NORMALIZATIONS)) = field(
        default="element-wise",
        metadata={"help": "normalization operator T_w (Section 3, Equation 5; none is SAM)"},
    )
    normalize_bias: bool = field(
        default=False,
        metadata={"help": "normalize biases too (Section 3; Figure 4 shows no gain from it)"},
    )


class SharpnessAwareOptimizer:
    """What ``asam`` and ``sam`` add to the fairseq optimizer that they extend."""

    sharpness_options: type

    def __init__(self, cfg, params):
        validate_config(cfg)
        super().__init__(cfg, params)
        self.sharpness_config = cfg
        self.ascended = False
        self._perturbation: Optional[Perturbation] = None

    @classmethod
    def add_args(cls, parser: ArgumentParser) -> None:
        """Add the options of the base optimizer, and then ours."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, cls.sharpness_options())

    def perturbation(self, model: Module, criterion: Module, optimizer: FairseqOptimizer) -> Perturbation:
        """Return the perturbation of the weights that *optimizer*, which is or wraps this one, trains. Made
        once: fairseq builds a new optimizer when the parameters change."""
        if self._perturbation is None:
            cfg = self.sharpness_config
            self._perturbation = Perturbation(
                chain(*(selected_parameters(m, str(cfg.perturbed_weights)) for m in (model, criterion))),
                **_region(cfg),
                normalize_bias=getattr(cfg, "normalize_bias", False),
                masters=master_weights(optimizer),
            )
        return self._perturbation

    def step(self, *args, **kwargs):
        """Step at w, once per pass at w + epsilon.

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
        return super().step(*args, **kwargs)


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
    if not optimizer.has_flat_params:
        return dict(zip(optimizer.fp16_params, optimizer.fp32_params))
    masters, offsets = {}, dict.fromkeys(optimizer.fp32_params, 0)
    for parameter in optimizer.fp16_params:
        device = parameter.device.index
        end = offsets[device] + parameter.numel()
        masters[parameter] = optimizer.fp32_params[device].detach()[offsets[device] : end].view_as(parameter)
        offsets[device] = end
    return masters


def validate_config(cfg: Any) -> None:
    """Raise ValueError, in one sentence, if an option of *cfg* is out of range."""
    validate(**_region(cfg))


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
    config = None  # older optimizers of fairseq have none, and take the parsed arguments as they are
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
