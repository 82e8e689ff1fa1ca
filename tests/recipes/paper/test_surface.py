"""The loss around the weights of a small network."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from fairseq_asam import Region, measure
from fairseq_asam.measuring import __main__ as measuring_command
from recipes.paper import surface as surface_command
from recipes.paper.surface import draw, filter_normalized_direction, main, surface


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss_of(model: nn.Module):
    inputs = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    return lambda: model(inputs).square().mean()


def test_the_surface_goes_through_w_and_epsilon_and_leaves_the_weights_alone(model):
    before = [p.clone() for p in model.parameters()]
    found = surface(loss_of(model), model, Region(0.4), radius=0.3, points=3, seed=2)
    assert all(map(torch.equal, before, model.parameters()))

    [sharpness] = measure(loss_of(model), model, [Region(0.4)])
    loss = found["loss"]
    assert found["x"] == found["y"] == [-1.0, 0.0, 1.0]
    assert loss[1][1] == pytest.approx(found["loss_at_w"])
    assert loss[1][2] - loss[1][1] == pytest.approx(sharpness.value)

    direction = filter_normalized_direction(dict(model.named_parameters()), seed=2)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights += 0.3 * direction[name]
    assert loss[2][1] == pytest.approx(loss_of(model)().item())


def test_a_loss_that_is_not_finite_is_none_and_can_be_drawn(model):
    values = []

    def loss() -> torch.Tensor:
        values.append(loss_of(model)() * (torch.inf if len(values) == 3**2 + 1 else 1))
        return values[-1]

    found = surface(loss, model, Region(0.4), points=3)
    assert [value for row in found["loss"] for value in row] == [*(v.item() for v in values[2:-1]), None]
    titles = [panel.get_title() for panel in draw({"one": found}).axes]
    assert titles[:2] == [f"one: loss {values[0].item():.3f} at $w$", "Lines through $w$"]


def test_a_random_direction_has_the_lengths_of_the_filters():
    torch.manual_seed(0)
    weights = {"conv": torch.randn(5, 3, 2, 2), "matrix": torch.randn(4, 7), "bias": torch.randn(4)}
    weights["matrix"][2] = 0.0
    direction = filter_normalized_direction(weights, 1)
    for name in ("conv", "matrix"):
        lengths = [x.flatten(1).norm(dim=1) for x in (weights[name], direction[name])]
        torch.testing.assert_close(*lengths)
    assert not direction["bias"].any()
    again, other = (filter_normalized_direction(weights, seed) for seed in (1, 2))
    assert torch.equal(again["conv"], direction["conv"]) and not torch.equal(other["conv"], direction["conv"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.png", "--points", "4"], "surface: --points is 4, but it must be an odd number from 3"),
        (["out.jpg"], "surface: 'out.jpg' is not the name of a PNG file: let it end in .png."),
    ],
)
def test_a_mistake_ends_the_command_before_a_checkpoint_is_read(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["surface", "data", *arguments, "--path", "none.pt"])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value).startswith(message) and "\n" not in str(end.value)


def test_the_command_draws_checkpoints_as_measuring_measures_them(command, adam, asam, data, tmp_path):
    picture = tmp_path / "surface.png"
    same = ["--batches", 1, "--rho", 0.4, "--seed", 5]
    out = command(surface_command, data, picture, "--path", adam, asam, "--points", 3, "--radius", 0.2, *same)
    assert out.count("0 points are not finite") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(picture.with_suffix(".json").read_text())
    for path in (adam, asam):
        command(measuring_command, data, "--path", path, "--json", tmp_path / "measured.json", *same)
        measured = json.loads((tmp_path / "measured.json").read_text())
        loss, rise = written["surfaces"][path]["loss"], measured["regions"][0]["adaptive_sharpness"]
        assert loss[1][1] == pytest.approx(measured["loss"], rel=1e-6)
        assert loss[1][2] - loss[1][1] == pytest.approx(rise, rel=1e-3)
        assert loss[1][0] < loss[1][1] < loss[1][2]
