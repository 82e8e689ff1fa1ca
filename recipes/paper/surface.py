"""Draws the loss around fairseq checkpoints, side by side.

    python -m recipes.paper.surface DATA OUT.png --path CHECKPOINT CHECKPOINT

One axis is the epsilon of adaptive sharpness (Equation 4) with radius --rho. The other is a random direction,
filter-normalized (Li et al., 2018): the part of each filter has --radius times the length of the filter. The
numbers are written to OUT.json. --help lists the other options.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from tqdm import tqdm

from fairseq_asam import Region, measure
from fairseq_asam.files import write_json
from fairseq_asam.measuring.command_line import OF_CHECKPOINTS, add_shared_options, watched
from fairseq_asam.measuring.fairseq_checkpoints import DatasetLoss, load
from fairseq_asam.sharpness.measure import Displaced, Loss, evaluate
from recipes.reporter import write_figure


def filter_normalized_direction(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a random direction whose part for each filter of *weights* has the length of the filter.

    A filter is a slice of the first dimension: a filter of a convolution, the weights of a neuron, the
    embedding of a word. For biases and other vectors the direction is 0, as in Li et al. (2018).
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, weight in weights.items():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
        if weight.dim() < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        inner = tuple(range(1, weight.dim()))
        lengths = [torch.linalg.vector_norm(w, dim=inner, keepdim=True) for w in (weight, noise)]
        direction[name] = noise * (lengths[0] / lengths[1])
    return direction


def surface(
    loss: Loss, model: nn.Module, region: Region, radius: float = 0.5, points: int = 11, seed: int = 1
) -> dict[str, Any]:
    """Return the loss at w + x epsilon + y d for x and y from -1 to 1, *points* of each.

    Args:
        loss: Is called ``points**2 + 2`` times.
        model: Should be in evaluation mode.
        region: Epsilon is that of one ascent step in it.
        radius: d is so many times a filter-normalized random direction.
        points: On each axis.
        seed: Of the random direction.

    Returns:
        The axes ``x`` and ``y`` and the losses, with ``loss[i][j]`` at ``y[i]`` and ``x[j]``. A loss that is
        not finite is ``None``.
    """
    [found] = measure(loss, model, [region], seed=seed, keep_epsilon=True)
    weights = {name: p.detach() for name, p in model.named_parameters() if name in found.epsilon}
    epsilon = [found.epsilon[name] for name in weights]
    direction = list(filter_normalized_direction(weights, seed).values())
    axis = np.linspace(-1, 1, points).tolist()

    def loss_at(x: float, y: float) -> float | None:
        offset = list(torch._foreach_mul(epsilon, x))
        torch._foreach_add_(offset, direction, alpha=y * radius)
        with Displaced(weights.values(), offset):
            value = evaluate(loss)
        return value if math.isfinite(value) else None

    return {
        "rho": region.rho,
        "radius": radius,
        "loss_at_w": found.loss,
        "x": axis,
        "y": axis,
        "loss": [[loss_at(x, y) for x in axis] for y in axis],
    }


def draw(surfaces: dict[str, dict[str, Any]]) -> plt.Figure:
    """Draw a map of each of *surfaces*, by name, all in the same colours, and the lines through w."""
    figure, panels = plt.subplots(
        1, len(surfaces) + 1, figsize=(4.4 * len(surfaces) + 4.4, 4.6), layout="constrained"
    )
    losses = {name: np.array(each["loss"], dtype=float) for name, each in surfaces.items()}
    low, high = (f([f(loss) for loss in losses.values()]) for f in (np.nanmin, np.nanmax))
    levels = MaxNLocator(25).tick_values(low, high)
    for panel, (name, each) in zip(panels, surfaces.items()):
        x, y = np.array(each["x"]) * each["rho"], np.array(each["y"]) * each["radius"]
        panel.grid(False)
        colours = panel.contourf(x, y, losses[name], levels=levels, cmap="viridis")
        panel.contour(x, y, losses[name], levels=levels, colors="white", linewidths=0.4)
        panel.plot(0, 0, "o", color="tab:red")
        panel.set_title(f"{name}: loss {each['loss_at_w']:.3f} at $w$")
        panel.set_xlabel("along $\\epsilon$, in $\\rho$")
        panel.xaxis.set_major_locator(MaxNLocator(5))
    panels[0].set_ylabel("along a random direction, in lengths of filters")
    figure.colorbar(colours, ax=panels[-2], label="loss (nats per token)")
    for number, (name, each) in enumerate(surfaces.items()):
        middle, colour = len(each["x"]) // 2, f"C{number}"
        rise = losses[name] - each["loss_at_w"]
        panels[-1].plot(each["x"], rise[middle], color=colour, label=f"{name}, $\\epsilon$")
        panels[-1].plot(each["y"], rise[:, middle], "--", color=colour, label=f"{name}, random")
    panels[-1].set(
        title="Lines through $w$", xlabel="edges of the maps: $\\pm 1$", ylabel="loss $-$ loss at $w$"
    )
    figure.legend(loc="outside lower right", ncols=len(surfaces))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.paper.surface",
        description="Draw the loss around checkpoints, along epsilon and a random direction.",
    )
    parser.add_argument("data", metavar="DATA", help="folder that fairseq-preprocess wrote")
    add_shared_options(parser, *OF_CHECKPOINTS)
    add_shared_options(parser, "--batches", default=4)
    add_shared_options(parser, "--seed", "--cpu")
    parser.add_argument("out", type=Path, metavar="OUT.png", help="the picture; the numbers go to OUT.json")
    parser.add_argument("--path", nargs="+", required=True, metavar="CHECKPOINT", help="fairseq checkpoints")
    add_shared_options(parser, "--rho", nargs=None, default=1.0, help="radius of the region of epsilon")
    add_shared_options(parser, "--eta")
    parser.add_argument(
        "--radius",
        type=float,
        default=0.5,
        help="largest step along the random direction, in lengths of filters (default: 0.5)",
    )
    parser.add_argument(
        "--points", type=int, default=11, help="points on an axis, an odd number (default: 11)"
    )
    args = parser.parse_args()
    try:
        run(args)
    except ValueError as error:
        sys.exit(f"surface: {error}.")


def run(args: argparse.Namespace) -> None:
    """Compute the surfaces, and write the picture and the numbers."""
    if args.points < 3 or args.points % 2 == 0:
        raise ValueError(
            f"--points is {args.points}, but it must be an odd number from 3, so that w is on the grid"
        )
    if args.out.suffix != ".png":
        raise ValueError(f"'{args.out}' is not the name of a PNG file: let it end in .png")
    region = Region(args.rho, args.eta)
    losses = {}
    for path in args.path:
        checkpoint = load(path, args.data, args.user_dir, args.cpu)
        losses[path] = DatasetLoss(checkpoint, args.gen_subset, args.max_tokens, args.batches, args.seed)
    surfaces = {}
    passes = sum(len(loss.batches) for loss in losses.values()) * (args.points**2 + 2)
    warnings.simplefilter("ignore")  # torch's of what will change; what is not finite is counted
    with tqdm(total=passes, unit="batch", desc="surface", disable=None) as bar:
        for path, loss in losses.items():
            surfaces[path] = surface(
                watched(loss, bar), loss.model, region, args.radius, args.points, args.seed
            )
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "path")}
    write_json(args.out.with_suffix(".json"), {**settings, "surfaces": surfaces}, indent=None)
    names = [Path(path).resolve().parent.name for path in surfaces]
    if len(set(names)) < len(names):
        names = list(surfaces)
    write_figure(args.out, draw(dict(zip(names, surfaces.values()))))
    for name, each in zip(names, surfaces.values()):
        missing = sum(value is None for row in each["loss"] for value in row)
        print(f"{name}: loss {each['loss_at_w']:.4f} nats per token, {missing} points are not finite")
    print(f"In {args.out.parent}: {args.out.name}, {args.out.with_suffix('.json').name}.")


if __name__ == "__main__":
    main()
