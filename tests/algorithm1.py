"""Algorithm 1 in a plain loop, in float64, without a framework and without ``fairseq_asam``."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from tests.sharpness.plain_directions import TWO_PASSES, VECTORS
from tests.sharpness.plain_epsilon import epsilon


def algorithm_1(
    model,
    optimizer,
    updates,
    loss_of,
    *,
    rho,
    eta=0.01,
    p=2.0,
    normalization="element-wise",
    normalize_bias=False,
    direction="gradient",
    seed=0,
    ascent_from=0,
    ascent_scope="update",
    clip=lambda weights: None,
    factor=lambda number: 1.0,
    context=contextlib.nullcontext,
):
    """Train *model*, and return L(w) and L(w + epsilon) of each update.

    *updates* has the micro-batches of each update. ``loss_of(model, micro_batch, update)`` is that part of
    the update's loss. The learning rate is that of *optimizer* times ``factor(number)``.
    """
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []

    def gradient(batches, update):
        with context():
            parts = [loss_of(model, batch, update) for batch in batches]
        values.append(sum(part.item() for part in parts))
        return dict(zip(trained, torch.autograd.grad(sum(parts), [*trained.values()])))

    for number, update in enumerate(updates):
        values = []
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor(number)
        total = {name: torch.zeros_like(w) for name, w in trained.items()}
        for batches in [update] if ascent_scope == "update" else [[batch] for batch in update]:
            before = {name: w.detach().clone() for name, w in trained.items()}
            if number >= ascent_from:
                moments = {
                    name: optimizer.state[w].get("exp_avg", optimizer.state[w].get("momentum_buffer"))
                    for name, w in trained.items()
                    if w in optimizer.state
                }
                at_w = gradient(batches, update) if direction in TWO_PASSES else None
                vectors = VECTORS[direction](
                    gradients=at_w, moments=moments, weights=trained, seed=seed, number=number
                )
                options, moves = (rho, eta, p, normalization, normalize_bias), {}
                if normalization == "adam":
                    moves = in_adams_metric(trained, vectors, optimizer, rho)
                elif vectors:  # there are no moments before the first step
                    moves = epsilon(in_numpy(before), in_numpy(vectors), *options)
                for name, move in moves.items():
                    trained[name].data += torch.as_tensor(move).to(trained[name])
            for name, g in gradient(batches, update).items():
                total[name] += g
            for name, w in before.items():
                trained[name].data = w
        for name, w in trained.items():
            w.grad = total[name]
        clip([*trained.values()])
        optimizer.step()
        losses.append(values)
    return losses


def in_adams_metric(weights, gradients, optimizer, rho):
    """rho T^2 g / ||T g|| with T = (sqrt(v_hat) + eps)^(-1/2), of the weights that have been stepped."""
    stepped = {name: w for name, w in weights.items() if w in optimizer.state}
    moves = {}
    for name, w in stepped.items():
        state, (group, *_) = optimizer.state[w], optimizer.param_groups
        v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        moves[name] = gradients[name] / (v.sqrt() + group["eps"])
    norm = sum((moves[name] * gradients[name]).sum() for name in stepped) ** 0.5
    return {name: rho * move / norm for name, move in moves.items()}


def in_numpy(tensors):
    return {name: tensor.detach().double().numpy() for name, tensor in tensors.items()}


class Net(nn.Module):
    """A classifier in float64. It remembers the masks of its dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.dropout, self.masks = dropout, []
        self.double()

    def forward(self, x):
        hidden = self.norm(self.first(x)).tanh()
        if self.dropout and self.training:
            self.masks.append((torch.rand(hidden.shape) >= self.dropout).to(hidden))
            hidden = hidden * self.masks[-1]
        return self.second(hidden)


def examples(count=24):
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(3, (count,), generator=generator)


def gradients_of_outputs(model):
    """The largest number in the gradient of the outputs of *model*, of each backward pass from now on."""
    found = []

    model.register_forward_hook(lambda model, inputs, outputs: note_gradient(outputs, found))
    return found


def note_gradient(outputs, found):
    """Append the largest number in the gradient of *outputs* to *found*, when a backward pass makes it."""
    outputs.register_hook(lambda gradient: found.append(gradient.abs().max().item()))


def assert_close(model, other, tolerance=1e-12):
    for (name, w), v in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(w, v, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def assert_far(model, other):
    """The plain update would be elsewhere: what is compared depends on epsilon."""
    assert max((w - v).abs().max() for w, v in zip(model.parameters(), other.parameters())) > 1e-6
