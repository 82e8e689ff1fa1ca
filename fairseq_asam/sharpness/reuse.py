"""The part of an ascent step that later updates can reuse: LookSAM (Liu et al., arXiv 2203.02714)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def orthogonal_component_(gradients: list[Tensor], perturbed: list[Tensor]) -> None:
    """Turn *gradients*, g at w, in place into the component orthogonal to g of *perturbed*, g_s at
    w + epsilon, in units of the length of the parallel one (Algorithm 1 of LookSAM, but for the unit)::

        g_h = (<g, g_s> / ||g||^2) g        g_v = (g_s - g_h) / ||g_h||

    Its length is the tangent of the angle between g and g_s. Products and norms are over all tensors
    together, and g may be in another unit than g_s. Without a g_h, or if g_v is nothing but rounding, as
    at rho 0, or not finite, there is nothing to reuse: it becomes 0.
    """
    square = _product(gradients, gradients)
    share = torch.where(square > 0, _product(gradients, perturbed) / square, 0.0)
    for g, g_s in zip(gradients, perturbed):
        g.mul_(-share.to(g)).add_(g_s)
    parallel = share.abs() * square.sqrt()
    rounding = 8 * torch.finfo(square.dtype).eps
    significant = _product(gradients, gradients).sqrt() > rounding * parallel
    unit = torch.where(significant & (parallel > 0), 1.0 / parallel, 0.0)
    for g_v in gradients:  # 0 * inf and 0 * nan are nan
        g_v.mul_(unit.to(g_v)).masked_fill_((unit == 0).to(g_v.device), 0.0)


@torch.no_grad()
def add_component_(gradients: list[Tensor], component: list[Tensor], alpha: float | None) -> None:
    """Add to *gradients*, g at w, in place the *component* g_v of an earlier update::

        g + alpha (||g|| / ||g_v||) g_v

    (Algorithm 1 of LookSAM). Without *alpha* it is ||g_v||, at most 1, so that the sum is at the angle to g
    at which that update found the gradient at w + epsilon. A zero g_v adds nothing.
    """
    length = _product(component, component).sqrt()
    wanted = length.clamp(max=1.0) if alpha is None else alpha
    scale = torch.where(length > 0, wanted * _product(gradients, gradients).sqrt() / length, 0.0)
    for g, g_v in zip(gradients, component):
        g.addcmul_(g_v, scale.to(g))


def _product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    products = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b)]
    return torch.stack([product.to(products[0]) for product in products]).sum()
