"""The part of an ascent step that later updates can reuse: LookSAM (Liu et al., arXiv 2203.02714)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def orthogonal_component_(gradients: list[Tensor], perturbed: list[Tensor]) -> None:
    """Turn *gradients*, g at w, in place into the component orthogonal to g of *perturbed*, g_s at
    w + epsilon (Algorithm 1 of LookSAM)::

        g_v = g_s - (<g, g_s> / ||g||^2) g

    Products and norms are over all tensors together, and g may be in another unit than g_s. A zero g leaves
    g_s. A g_v that is nothing but rounding, as at rho 0, becomes 0: :func:`add_component_` would blow it up.
    """
    square = _product(gradients, gradients)
    share = torch.where(square > 0, _product(gradients, perturbed) / square, 0.0)
    for g, g_s in zip(gradients, perturbed):
        g.mul_(-share.to(g)).add_(g_s)
    rounding = 8 * torch.finfo(gradients[0].dtype).eps
    significant = _product(gradients, gradients) > rounding**2 * _product(perturbed, perturbed)
    for g_v in gradients:
        g_v.mul_(significant.to(g_v))


@torch.no_grad()
def add_component_(gradients: list[Tensor], component: list[Tensor], alpha: float) -> None:
    """Add to *gradients*, g at w, in place the *component* g_v of an earlier update (Algorithm 1 of
    LookSAM)::

        g + alpha (||g|| / ||g_v||) g_v

    A zero g_v adds nothing.
    """
    square = _product(component, component)
    scale = alpha * torch.where(square > 0, (_product(gradients, gradients) / square).sqrt(), 0.0)
    for g, g_v in zip(gradients, component):
        g.addcmul_(g_v, scale.to(g))


def _product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    products = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b)]
    return torch.stack([product.to(products[0]) for product in products]).sum()
