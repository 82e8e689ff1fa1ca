"""Normalization operators: each T by hand, and its flat form against its diagonal."""

import pytest
import torch

from fairseq_asam import NORMALIZATIONS
from fairseq_asam.sharpness.normalization import is_bias, operator_of

ETA = 0.5
MATRIX, FILTERS = [[3.0, -4.0], [0.0, 12.0]], [[[3.0, -4.0]], [[0.0, 12.0]]]
BY_HAND = {
    "none": ([[1.0, 1.0], [1.0, 1.0]], [[[1.0, 1.0]], [[1.0, 1.0]]]),
    "element-wise": ([[3.5, 4.5], [0.5, 12.5]], [[[3.5, 4.5]], [[0.5, 12.5]]]),
    "filter-wise": ([[3.5, 4.5], [0.5, 12.5]], [[[5.5, 5.5]], [[12.5, 12.5]]]),
    "layer-wise": ([[13.5, 13.5], [13.5, 13.5]], [[[13.5, 13.5]], [[13.5, 13.5]]]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_diagonal_by_hand(name):
    for weight, expected in zip((MATRIX, FILTERS), BY_HAND[name]):
        weight = torch.tensor(weight)
        [diagonal] = operator_of("layer.weight", weight, name, False).diagonal([weight], ETA) or [
            torch.ones(1)
        ]
        assert torch.equal(diagonal.expand_as(weight), torch.tensor(expected))


@pytest.mark.parametrize("name", [name for name, each in NORMALIZATIONS.items() if each.has_flat_form])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_flat_form_is_that_of_the_diagonal(name, dtype):
    torch.manual_seed(0)
    weights, gradient = [torch.randn(n, dtype=dtype) for n in (7, 9)], torch.randn(16, dtype=dtype)
    operator = NORMALIZATIONS[name]
    diagonal = torch.cat(operator.diagonal(weights, ETA) or [torch.ones(16, dtype=dtype)])
    minus_eta = torch.tensor(-ETA, dtype=dtype)
    for flat in (weights, [torch.cat(weights)]):
        direction = operator.flat_direction(gradient, flat, minus_eta, torch.empty(16, dtype=dtype))
        torch.testing.assert_close(direction, diagonal**2 * gradient)


def test_a_bias_is_what_has_the_word_in_its_own_name():
    biases = ["bias", "fc.bias", "lstm.bias_ih_l0", "attention.in_proj_bias", "attention.bias_k"]
    others = ["weight", "bias_net.weight", "biased.gain", "embed.debias", "relative_attention_bias.weight"]
    assert [is_bias(name) for name in biases + others] == [True] * 5 + [False] * 5
