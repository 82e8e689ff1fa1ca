"""What the base optimizer keeps of earlier gradients, of which a direction or a metric can be made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .shards import local

#: Name of the normalization operator that :func:`adam_diagonals` computes.
ADAM = "adam"


def first_moments(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the first moment of each weight that *optimizer* has stepped.

    Of Adam it is the running mean of the gradients (``exp_avg``), of SGD the ``momentum_buffer``.

    Raises:
        ValueError: the optimizer keeps none.
    """
    kept = _kept(optimizer, ("exp_avg", "momentum_buffer"))
    if kept is None or any(group.get("momentum") == 0 for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} keeps no first moment to take the direction of epsilon from: use an "
            "optimizer with momentum, such as Adam, or the direction gradient"
        )
    # fairseq's NAG, which alone has `lr_old`, keeps its last step in place of the moment: the other way.
    return {weight: -moment if "lr_old" in group else moment for weight, (moment, group, _) in kept.items()}


def second_moments(
    optimizer: torch.optim.Optimizer,
) -> dict[Tensor, tuple[Tensor, dict[str, Any], dict[str, Any]]]:
    """Return Adam's second moment v of each weight that *optimizer* has stepped, its group and its state.

    With AMSGrad, v is the largest so far.

    Raises:
        ValueError: the optimizer keeps none.
    """
    kept = _kept(optimizer, ("max_exp_avg_sq", "exp_avg_sq"))
    if kept is None or any("betas" not in group for group in optimizer.param_groups):
        raise ValueError(
            f"{type(optimizer).__name__} does not keep Adam's second moment, from which the normalization "
            "adam is made: use Adam, or another normalization"
        )
    return kept


@torch.no_grad()
def adam_diagonals(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return T = (sqrt(v_hat) + eps)^(-1/2) of each weight that *optimizer* has stepped.

    v_hat is Adam's second moment without its bias to 0, and eps the one of Adam. In this metric epsilon of
    the gradient g is along g / (sqrt(v_hat) + eps), as Adam's step is (arXiv 2502.02407). Of weights in
    shards, it is this process's part.

    Raises:
        ValueError: the optimizer keeps no second moment.
    """
    kept = second_moments(optimizer)
    steps = [state.get("step", group.get("step")) for _, group, state in kept.values()]
    one_eps = all(isinstance(group.get("eps"), (int, float)) for _, group, _ in kept.values())
    if not one_eps or any(step is None for step in steps):
        raise ValueError(
            f"{type(optimizer).__name__} does not keep the number of its steps and one eps as Adam does, and "
            "the normalization adam needs both: use torch's Adam or AdamW, or another normalization"
        )
    stepped = dict(zip(kept, _numbers(steps)))
    # A fused Adam has a state, of no step yet, where GradScaler skipped the first one.
    kept = {weight: each for weight, each in kept.items() if stepped[weight] > 0}
    if not kept:
        return {}
    unbiased = [
        (1.0 - group["betas"][1] ** stepped[weight]) ** -0.5 for weight, (_, group, _) in kept.items()
    ]
    diagonals = list(torch._foreach_sqrt([local(moment) for moment, _, _ in kept.values()]))
    torch._foreach_mul_(diagonals, unbiased)
    torch._foreach_add_(diagonals, [group["eps"] for _, group, _ in kept.values()])
    torch._foreach_pow_(diagonals, -0.5)
    return dict(zip(kept, diagonals))


def only_a_part(optimizer: torch.optim.Optimizer) -> ValueError:
    """Return the error for an *optimizer* that does not keep the moments of all weights."""
    return ValueError(
        f"{type(optimizer).__name__} has only a part of the weights' moments, as with "
        "ZeroRedundancyOptimizer: use an optimizer with all of them, or a direction and a normalization that "
        "need none"
    )


def _numbers(steps: Sequence[Any]) -> list[float]:
    """Return *steps* as numbers. A fused Adam has each on the accelerator: read them all at once."""
    devices = {step.device if isinstance(step, Tensor) else None for step in steps}
    if len(devices) != 1 or None in devices:
        return [float(step) for step in steps]
    return torch.stack([step.reshape(()) for step in steps]).tolist()


def _kept(
    optimizer: torch.optim.Optimizer, keys: Sequence[str]
) -> dict[Tensor, tuple[Tensor, dict[str, Any], dict[str, Any]]] | None:
    """Return the first of *keys* that the state of each weight has, with the weight's group and state.

    Weights without a state are left out. ``None`` if there are states, but none of them has such a key.

    Raises:
        ValueError: the states are in parts on several processes.
    """
    # ZeroRedundancyOptimizer, and fairscale's OSS, keep the state of their part in `optim`.
    part = getattr(optimizer, "optim", None)
    if isinstance(part, torch.optim.Optimizer) and part.state is not optimizer.state:
        raise only_a_part(optimizer)
    kept, others = {}, False
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state.get(weight, {})
            found = next((state[key] for key in keys if isinstance(state.get(key), Tensor)), None)
            if found is not None:
                kept[weight] = found, group, state
            others = others or bool(state and found is None)
    return None if others and not kept else kept
