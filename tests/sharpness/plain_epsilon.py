"""Epsilon in plain numpy: the formula of Section 4 without blocks, fast paths or kept memory."""

import math

import numpy as np


def over(axes, w, eta):
    """The l2 norm over *axes* + eta, in the shape of w."""
    return np.sqrt((w**2).sum(axis=tuple(axes), keepdims=True)) + eta + np.zeros_like(w)


#: The diagonal of T for a weight that is not a bias. A new normalization operator gets a row here.
DIAGONALS = {
    "none": lambda w, eta: np.ones_like(w),
    "element-wise": lambda w, eta: abs(w) + eta,
    "filter-wise": lambda w, eta: over(range(1, w.ndim), w, eta) if w.ndim >= 3 else abs(w) + eta,
    "layer-wise": lambda w, eta: over(range(w.ndim), w, eta) if w.ndim >= 2 else abs(w) + eta,
}


def diagonal(name, w, normalization, eta, normalize_bias=False):
    is_bias = "bias" in name.split(".")[-1].split("_")
    return np.ones_like(w) if is_bias and not normalize_bias else DIAGONALS[normalization](w, eta)


def epsilon(weights, gradients, rho, eta, p, normalization, normalize_bias=False):
    """By name, from weights and gradients by name, all float64."""
    q = 1.0 if p == math.inf else p / (p - 1)
    t = {name: diagonal(name, w, normalization, eta, normalize_bias) for name, w in weights.items()}
    tg = {name: t[name] * g for name, g in gradients.items()}
    unit = max(abs(each).max(initial=0) for each in tg.values()) or 1.0  # keeps powers in range
    norm = sum((abs(each / unit) ** q).sum() for each in tg.values()) ** (1 / q) or 1.0
    return {
        name: rho * t[name] * np.sign(each) * (abs(each) / unit / norm) ** (q - 1)
        for name, each in tg.items()
    }
