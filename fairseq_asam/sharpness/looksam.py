"""What later updates reuse of the gradient at w + epsilon: LookSAM (Liu et al., arXiv 2203.02714)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def orthogonal_component_(gradients: list[Tensor], perturbed: list[Tensor]) -> None:
    """Turn g into the part of g_s that is orthogonal to g (Algorithm 1 of LookSAM, but for the unit)::

        g_h = (<g, g_s> / ||g||^2) g        g_v = (g_s - g_h) / ||g_h||

    ||g_v|| is the tangent of the angle between g and g_s. Products and norms are over all tensors together.
    g and g_s may be in different units. g_v becomes 0 if there is nothing to reuse: if g_h is 0, if g_v is
    nothing but rounding, as at rho 0, or if it is not finite.

    Args:
        gradients: g, the gradient at w; g_v afterwards.
        perturbed: g_s, the gradient at w + epsilon.
    """
    square = _product(gradients, gradients)
    share = torch.where(square > 0, _product(gradients, perturbed) / square, 0.0)
    for g, g_s in zip(gradients, perturbed):
        g.mul_(-share.to(g)).add_(g_s)
    parallel = share.abs() * square.sqrt()
    rounding = 8 * torch.finfo(square.dtype).eps
    significant = _product(gradients, gradients).sqrt() > rounding * parallel
    unit = torch.where(significant & (parallel > 0), 1.0 / parallel, 0.0)
    for g_v in gradients:
        # Fill with 0, because 0 * inf and 0 * NaN are NaN.
        g_v.mul_(unit.to(g_v)).masked_fill_((unit == 0).to(g_v.device), 0.0)


@torch.no_grad()
def add_component_(gradients: list[Tensor], component: list[Tensor], alpha: float | None) -> None:
    """Add the component of an earlier update to the gradient (Algorithm 1 of LookSAM)::

        g + alpha (||g|| / ||g_v||) g_v

    Args:
        gradients: g, the gradient at w; the sum afterwards.
        component: g_v. If it is 0, nothing is added.
        alpha: length of what is added, relative to g. ``None`` means ||g_v||, at most 1: the sum then is at
            the same angle to g as the gradient at w + epsilon was in the earlier update.
    """
    length = _product(component, component).sqrt()
    wanted = length.clamp(max=1.0) if alpha is None else alpha
    scale = torch.where(length > 0, wanted * _product(gradients, gradients).sqrt() / length, 0.0)
    for g, g_v in zip(gradients, component):
        g.addcmul_(g_v, scale.to(g))


def _product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return the scalar product of *a* and *b*, each joined into one vector."""
    products = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b)]
    return torch.stack([product.to(products[0]) for product in products]).sum()
