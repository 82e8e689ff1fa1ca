"""Algorithm 1 of SAM and ASAM, and LookSAM's reuse, in plain loops to be checked by eye: the whole batch on
one worker, every gradient a dictionary by name. Nothing here comes from the code under test."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from fairseq.trainer import Trainer
from torch import nn

from tests.sharpness.plain_directions import ONE_PASS, VECTORS
from tests.sharpness.plain_epsilon import diagonal


@dataclass
class Reference:
    """Updates the model of *trainer*, which is in float64, has the base optimizer, and the options of the run
    but ours. ``zeros``: a weight that the loss does not depend on is stepped with zeros, and not left out."""

    trainer: Trainer
    rho: float
    eta: float = 0.01
    p: float = 2.0
    normalization: str = "none"
    normalize_bias: bool = False
    perturbed: str = "all"
    scope: str = "update"
    fresh_masks: bool = False
    interval: int = 1
    alpha: float | None = None
    zeros: bool = False
    direction: str = "gradient"

    def __post_init__(self):
        self.parts = self.trainer.model, self.trainer.criterion
        self.weights = {n: w for part in self.parts for n, w in part.named_parameters()}
        modules = [module for part in self.parts for module in part.modules()]
        self.embeddings = {m.weight for m in modules if isinstance(m, nn.Embedding)}
        self.gains = {w for m in modules if "Norm" in type(m).__name__ for w in m.parameters(recurse=False)}

    def update(self, batches, ascents=None, workers=None):
        """Make one update of *batches*, each on its worker, with the epsilon of *ascents*, parts of them."""
        micro_batches = list(zip(batches, ascents or batches, workers or [0] * len(batches)))
        number = self.trainer.get_num_updates()
        torch.manual_seed(self.trainer.cfg.common.seed + number)
        self.random_state = {worker: torch.get_rng_state() for _, _, worker in micro_batches}
        if self.direction in ONE_PASS:
            step = self.one_pass(micro_batches)
        elif number % self.interval > 0:
            step = self.reuse(total(self.gradient(batch, worker) for batch, _, worker in micro_batches))
        else:
            scopes = [micro_batches] if self.scope == "update" else [[one] for one in micro_batches]
            g, step = map(total, zip(*map(self.two_passes, scopes)))
            self.keep(g, step)
        step = {n: s / sum(batch["ntokens"] for batch in batches) for n, s in step.items()}
        clip_norm, self.norm = self.trainer.cfg.optimization.clip_norm, length(step)
        clip = clip_norm / (self.norm + 1e-6) if self.norm > clip_norm > 0 else 1.0
        for n, w in self.weights.items():
            w.grad = step[n] * clip if n in step else None
        self.trainer.optimizer.step()
        self.trainer.set_num_updates(number + 1)
        if self.trainer.cfg.ema.store_ema:
            self.trainer.ema.step(self.trainer.model, number + 1)

    def two_passes(self, micro_batches):
        """The gradients at w and at w + epsilon, each summed over *micro_batches*."""
        at_w, masks = [], []
        for _, ascent, worker in micro_batches:
            masks.append(None if self.fresh_masks else self.random_state[worker])
            at_w.append(self.gradient(ascent, worker))
        g, buffers = total(at_w), [x.clone() for x in self.trainer.model.buffers()]
        with self.perturbed_by(self.vectors(g)):
            perturbed = [self.gradient(b, worker, same) for (b, _, worker), same in zip(micro_batches, masks)]
        with torch.no_grad():
            for x, was in zip(self.trainer.model.buffers(), buffers):
                x.copy_(was)
        return g, total(perturbed)

    def one_pass(self, micro_batches):
        """The gradient at w + epsilon, summed over *micro_batches*."""
        with self.perturbed_by(self.vectors()):
            return total(self.gradient(batch, worker) for batch, _, worker in micro_batches)

    def vectors(self, gradients=None):
        """What epsilon is made of, given the gradients at w if there was a pass."""
        state = self.trainer.optimizer.optimizer.state
        moments = {n: state[w]["exp_avg"] for n, w in self.weights.items() if "exp_avg" in state.get(w, {})}
        chosen = {n: w for n, w in self.weights.items() if self.is_chosen(w)}
        seed, number = self.trainer.cfg.common.seed, self.trainer.get_num_updates()
        given = {"moments": moments, "weights": chosen, "seed": seed, "number": number}
        return VECTORS[self.direction](gradients=gradients, **given)

    @contextlib.contextmanager
    def perturbed_by(self, g):
        """Within the block, the weights are at w + epsilon; without g, at w."""
        before = {n: w.detach().clone() for n, w in self.weights.items()}
        with torch.no_grad():
            for n, epsilon in (self.epsilon(g) if g else {}).items():
                self.weights[n] += epsilon
        yield
        with torch.no_grad():
            for n, w in self.weights.items():
                w.copy_(before[n])

    def gradient(self, batch, worker, masks=None):
        """The gradient of the loss of *batch*, with the next dropout masks of *worker* or those that follow
        on the state *masks*."""
        torch.set_rng_state(self.random_state[worker] if masks is None else masks)
        for w in self.weights.values():
            w.grad = torch.zeros_like(w) if self.zeros else None
        model, criterion = self.parts
        criterion(model, batch)[0].backward()
        self.random_state[worker] = torch.get_rng_state()
        return {n: w.grad for n, w in self.weights.items() if w.grad is not None}

    def epsilon(self, g):
        """rho T sign(g) |T g|^(q-1) / ||T g||_q^(q-1), with 1/p + 1/q = 1."""
        q = 1.0 if math.isinf(self.p) else self.p / (self.p - 1)
        T = {n: self.operator(n, self.weights[n]) for n in g if self.is_perturbed(n)}
        if not T:
            return {}
        norm = sum((T[n] * g[n]).abs().pow(q).sum() for n in T) ** (1 / q)
        return {n: self.rho * T[n] * g[n].sign() * ((T[n] * g[n]).abs() / norm) ** (q - 1) for n in T}

    @torch.no_grad()
    def operator(self, name, w):
        """The diagonal of T_w + eta I."""
        if self.normalization == "adam":
            base = self.trainer.optimizer.optimizer
            (group,) = base.param_groups
            v_hat = base.state[w]["exp_avg_sq"] / (1 - group["betas"][1] ** base.state[w]["step"])
            return (v_hat.sqrt() + group["eps"]) ** -0.5
        options = self.normalization, self.eta, self.normalize_bias
        return torch.from_numpy(diagonal(name, w.detach().numpy(), *options))

    def is_perturbed(self, name):
        w = self.weights[name]
        if self.normalization == "adam" and not self.trainer.optimizer.optimizer.state.get(w):
            return False
        return self.is_chosen(w)

    def is_chosen(self, w):
        """Whether --perturbed-weights names *w*."""
        if self.perturbed == "normalization-layers":
            return w in self.gains
        return self.perturbed == "all" or w not in self.embeddings

    def keep(self, g, g_s):
        """Keep LookSAM's g_v: the part of g_s orthogonal to g, in units of the length of the parallel one."""
        share = product(g, g_s) / product(g, g)
        self.g_v = {n: (g_s[n] - share * g.get(n, 0.0)) / (abs(share) * length(g)) for n in g_s}

    def reuse(self, g):
        """g + alpha (||g|| / ||g_v||) g_v, over the weights that the loss depends on now and did then."""
        g_v = {n: v for n, v in self.g_v.items() if n in g}
        alpha = min(1.0, length(g_v)) if self.alpha is None else self.alpha
        scale = alpha * length({n: g[n] for n in g_v}) / length(g_v)
        return {n: g[n] + scale * g_v[n] if n in g_v else g[n] for n in g}


def total(gradients):
    gradients = list(gradients)
    names = dict.fromkeys(n for gradient in gradients for n in gradient)
    return {n: sum(gradient[n] for gradient in gradients if n in gradient) for n in names}


def product(a, b):
    return sum((a[n] * b[n]).sum() for n in a if n in b)


def length(a):
    return product(a, a).sqrt()
