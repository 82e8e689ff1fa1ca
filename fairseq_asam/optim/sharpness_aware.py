"""``--optimizer asam`` and ``--optimizer sam``: a fairseq optimizer that knows how to perturb its weights.

The passes at w and at w + epsilon are made in :mod:`fairseq_asam.tasks.sharpness_aware`.
"""

from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.optim import (
    OPTIMIZER_DATACLASS_REGISTRY,
    OPTIMIZER_REGISTRY,
    FairseqOptimizer,
    register_optimizer,
)
from torch.nn import Module

from fairseq_asam.sharpness import NORMALIZATIONS, Perturbation
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

    def __init__(self, cfg, params):
        validate_config(cfg)
        super().__init__(cfg, params)
        self.sharpness_config = cfg
        self.ascended = False
        self._perturbation: Optional[Perturbation] = None

    def perturbation(self, model: Module, criterion: Module) -> Perturbation:
        """Return the perturbation of the parameters that this optimizer optimizes. Made once: fairseq
        builds a new optimizer when the parameters change."""
        if self._perturbation is None:
            cfg = self.sharpness_config
            self._perturbation = Perturbation(
                chain(model.named_parameters(), criterion.named_parameters()),
                rho=cfg.rho,
                p=cfg.p_norm,
                eta=getattr(cfg, "eta", 0.0),
                normalization=str(getattr(cfg, "normalization", "none")),
                normalize_bias=getattr(cfg, "normalize_bias", False),
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


def sharpness_aware(optimizer: FairseqOptimizer) -> Optional[SharpnessAwareOptimizer]:
    """Return the sharpness-aware optimizer that *optimizer* is or wraps, or ``None``."""
    for wrapped in ("fp32_optimizer", "wrapped_optimizer"):
        optimizer = getattr(optimizer, wrapped, optimizer)
    return optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else None


def validate_config(cfg: Any) -> None:
    """Raise ValueError, in one sentence, if an option of *cfg* is out of range."""
    validate(
        rho=cfg.rho,
        eta=getattr(cfg, "eta", 0.0),
        p=cfg.p_norm,
        normalization=str(getattr(cfg, "normalization", "none")),
    )


def _register(name: str, config: type, base_name: str) -> None:
    base, base_config = OPTIMIZER_REGISTRY[base_name], OPTIMIZER_DATACLASS_REGISTRY[base_name]
    dataclass_ = dataclass(type(f"{config.__name__}_{base_config.__name__}", (config, base_config), {}))
    optimizer = type(f"{name}_{base.__name__}", (SharpnessAwareOptimizer, base), {"__doc__": base.__doc__})
    register_optimizer(name, dataclass=dataclass_)(optimizer)
    # fairseq resumes only into an optimizer whose class has the name in the checkpoint. The state is the
    # base's own, so that runs may go on with or without sharpness awareness.
    optimizer.__name__ = base.__name__


#: The values of ``--optimizer`` that this package adds.
OPTIMIZERS = {"asam": ASAMConfig, "sam": SAMConfig}
for _name, _config in OPTIMIZERS.items():
    _register(_name, _config, "adam")
