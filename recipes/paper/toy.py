"""Figures 1 and 3 of the paper: the toy loss of two weights (Section 5.1), drawn.

    python -m recipes.paper.toy OUT

Writes OUT/figure1.png, OUT/figure3.png and all numbers in them to OUT/toy.json. The paper does not state the
radii of Figure 1, nor the learning rate, the number of steps and ASAM's rho of Figure 3. The constants below
are our choice. T is not stabilized: eta = 0.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from fairseq_asam import NORMALIZATIONS, Region, SharpnessAware, measure
from fairseq_asam.files import write_json
from recipes.reporter import write_figure

#: The points of Figure 1, before and after the scaling diag(3, 1/3).
POINTS = ((1.0, 1.0), (3.0, 1 / 3))
FIGURE_1_RHO = 0.5
#: The regions of Figure 1, (a) to (c).
REGIONS = {
    "sphere": Region(FIGURE_1_RHO, normalization="none"),
    "cuboid": Region(FIGURE_1_RHO, eta=0.0, p=math.inf),
    "ellipsoid": Region(FIGURE_1_RHO, eta=0.0),
}
#: The initial weights of Figure 3.
STARTS = ((0.2, 0.05), (0.3, 0.033))
#: The methods of Figure 3; SAM's rho is the paper's.
METHODS = {"SAM": Region(0.05, normalization="none"), "ASAM": Region(0.5, eta=0.0)}
LEARNING_RATE = 0.004
STEPS = 2000


def toy_loss(w: Tensor) -> Tensor:
    """Return L(w) = |w_1 ReLU(w_2) - 0.04| for weights in the last dimension."""
    return (w[..., 0] * w[..., 1].relu() - 0.04).abs()


def weights_at(point: tuple[float, float]) -> nn.Parameter:
    """Return *point* as a parameter in float64."""
    return nn.Parameter(torch.tensor(point, dtype=torch.float64))


def maximum(point: tuple[float, float], region: Region) -> tuple[float, list[float]]:
    """Return sharpness at *point* and the point of *region* around it where the loss is largest."""
    w = weights_at(point)
    [found] = measure(lambda: toy_loss(w), [("w", w)], [region], steps=200, restarts=5, keep_epsilon=True)
    return found.value, (w.detach() + found.epsilon["w"]).tolist()


def trajectory(
    start: tuple[float, float],
    region: Region,
    learning_rate: float = LEARNING_RATE,
    steps: int = STEPS,
) -> list[list[float]]:
    """Return the weights before and after each of *steps* steps of SGD made sharpness-aware by *region*."""
    w = weights_at(start)
    optimizer = SharpnessAware(torch.optim.SGD([w], learning_rate), [("w", w)], **vars(region))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = toy_loss(w)
        loss.backward()
        return loss

    path = [w.tolist()]
    for _ in range(steps):
        optimizer.step(closure)
        path.append(w.tolist())
    return path


def figure_1() -> list[dict[str, Any]]:
    """Return the sharpness and the maximizing points in each region of Figure 1 around both points."""
    return [
        {
            "region": name,
            "rho": region.rho,
            "w": list(point),
            "loss": toy_loss(weights_at(point)).item(),
            **dict(zip(("sharpness", "maximum_at"), maximum(point, region))),
        }
        for name, region in REGIONS.items()
        for point in POINTS
    ]


def figure_3() -> list[dict[str, Any]]:
    """Return the trajectories of Figure 3, to six decimals."""
    return [
        {
            "method": method,
            "rho": region.rho,
            "start": list(start),
            "path": np.round(trajectory(start, region), 6).tolist(),
        }
        for method, region in METHODS.items()
        for start in STARTS
    ]


def draw_figure_1(rows: list[dict[str, Any]]) -> plt.Figure:
    """Draw what :func:`figure_1` returned."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained", sharey=True)
    x, y = np.meshgrid(np.linspace(0, 5.4, 400), np.linspace(-0.3, 2, 300))
    height = toy_loss(torch.tensor(np.stack([x, y], -1))).numpy()
    for panel, letter, (name, region) in zip(panels, "abc", REGIONS.items()):
        panel.grid(False)
        panel.contour(x, y, height, levels=np.arange(0, 8, 0.4), colors="0.8", linewidths=0.7)
        here = [row for row in rows if row["region"] == name]
        panel.contour(x, y, height, levels=[here[0]["loss"]], colors="tab:blue")
        panel.contour(x, y, height, levels=[here[0]["loss"] + here[0]["sharpness"]], colors="tab:red")
        for row, marker in zip(here, "o^"):
            point = np.array(row["w"])
            operator = NORMALIZATIONS[region.normalization]
            [diagonal] = operator.diagonal([torch.tensor(point)], region.eta) or [torch.ones(())]
            outline = point + boundary(region) * np.asarray(diagonal)
            panel.fill(*outline.T, facecolor="tab:green", alpha=0.15)
            panel.plot(*outline.T, color="tab:green")
            panel.annotate("", row["maximum_at"], point, arrowprops={"arrowstyle": "->"})
            panel.plot(*point, marker, color="black")
            panel.annotate(f"+{row['sharpness']:.3f}", row["maximum_at"], (4, 4), textcoords="offset points")
        panel.set(title=f"({letter}) {name}, $\\rho$ = {region.rho:g}", xlabel="$w_1$", aspect="equal")
    panels[0].set_ylabel("$w_2$")
    figure.suptitle("Contours at $w$ (blue) and at the maximum around $w$ (red); $w$: dot, $w'$: triangle")
    return figure


def boundary(region: Region) -> np.ndarray:
    """Return points around the boundary of *region* in the coordinates T^-1 epsilon, of shape (n, 2)."""
    angles = np.linspace(0, 2 * np.pi, 361)
    circle = np.stack([np.cos(angles), np.sin(angles)], -1)
    return region.rho * circle / np.linalg.norm(circle, ord=region.p, axis=-1, keepdims=True)


def draw_figure_3(rows: list[dict[str, Any]]) -> plt.Figure:
    """Draw what :func:`figure_3` returned."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 5), layout="constrained", sharey=True)
    x, y = np.meshgrid(np.linspace(0.1, 0.35, 300), np.linspace(-0.02, 0.28, 300))
    height = toy_loss(torch.tensor(np.stack([x, y], -1))).numpy()
    valley = np.linspace(0.14, 0.35, 200)
    for panel, start in zip(panels, STARTS):
        panel.grid(False)
        panel.contourf(x, y, height, levels=20, cmap="Greys", alpha=0.5)
        panel.plot(valley, 0.04 / valley, color="tab:red", label="minimizers, $w_1 w_2 = 0.04$")
        here = [row for row in rows if row["start"] == list(start)]
        for row, colour in zip(here, ("tab:blue", "tab:green")):
            path = np.array(row["path"])
            end = f"({path[-1, 0]:.3f}, {path[-1, 1]:.3f})"
            label = f"{row['method']}, $\\rho$ = {row['rho']:g}: to {end}"
            panel.plot(*path.T, color=colour, linewidth=1, label=label)
            panel.plot(*path[-1], "s", color=colour)
        panel.plot(*start, "o", color="black", markersize=11, fillstyle="none")
        panel.set(title=f"$w_0$ = {start}", xlabel="$w_1$", xlim=(0.1, 0.35), ylim=(-0.02, 0.28))
        panel.legend(loc="upper right")
    panels[0].set_ylabel("$w_2$")
    figure.suptitle(f"{STEPS} steps of SGD, learning rate {LEARNING_RATE}; circle: start, squares: end")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.paper.toy", description="Draw Figures 1 and 3 of the paper."
    )
    parser.add_argument("out", type=Path, help="folder for figure1.png, figure3.png and toy.json")
    args = parser.parse_args()
    first, third = figure_1(), figure_3()
    write_figure(args.out / "figure1.png", draw_figure_1(first))
    write_figure(args.out / "figure3.png", draw_figure_3(third))
    settings = {"learning_rate": LEARNING_RATE, "steps": STEPS, "eta": 0.0}
    write_json(args.out / "toy.json", {**settings, "figure_1": first, "figure_3": third}, indent=None)
    for row in first:
        (x, y), name = row["w"], row["region"]
        print(f"sharpness in the {name} around ({x:.3f}, {y:.3f}): {row['sharpness']:.4f}")
    for row in third:
        (x, y), start = row["path"][-1], tuple(row["start"])
        print(f"{row['method']} from {start} to ({x:.4f}, {y:.4f})")


if __name__ == "__main__":
    main()
