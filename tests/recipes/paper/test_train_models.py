"""Models of the grid on digits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fairseq_asam.vision.models import build_model
from recipes.paper.train_models import evaluate, load, mean_loss, regions


def test_the_loss_measured_is_that_of_the_training_images_in_evaluation_mode():
    """As fairseq_asam.vision has it, computed here in one piece and in float64."""
    torch.manual_seed(0)
    (train, _, classes), network = load("digits", None), build_model("mlp", 10, 0.5)
    loss, accuracy = evaluate(network, *train)
    terms = list(mean_loss(network.eval(), *train))
    assert sum(count for _, count in terms) == len(train[0]) == 1197 and classes == 10
    assert sum(term.item() for term, _ in terms) / 1197 == pytest.approx(loss, rel=1e-5)
    outputs = network.double()(train[0].double())
    assert loss == pytest.approx(F.cross_entropy(outputs, train[1]).item(), rel=1e-5)
    assert accuracy == (outputs.argmax(1) == train[1]).double().mean().item()


def test_the_cube_of_p_infinity_is_the_largest_in_the_ball():
    plain, adaptive, plain_cube, adaptive_cube = regions(0.1, 0.4, weights=400)
    assert (plain.rho, plain.p, plain.normalization) == (0.1, 2.0, "none")
    assert (adaptive.rho, adaptive.p, adaptive.normalization) == (0.4, 2.0, "element-wise")
    for ball, cube in ((plain, plain_cube), (adaptive, adaptive_cube)):
        assert cube.p == math.inf and cube.normalization == ball.normalization
        assert torch.full((400,), cube.rho).norm().item() == pytest.approx(ball.rho)
