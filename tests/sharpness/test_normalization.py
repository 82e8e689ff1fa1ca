"""Normalization operators: each T by hand, and what is a bias."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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


def test_a_bias_is_what_has_the_word_in_its_own_name():
    biases = ["bias", "fc.bias", "lstm.bias_ih_l0", "attention.in_proj_bias", "attention.bias_k"]
    others = ["weight", "bias_net.weight", "biased.gain", "embed.debias", "relative_attention_bias.weight"]
    assert [is_bias(name) for name in biases + others] == [True] * 5 + [False] * 5


class Same(nn.Module):
    """A parametrization that changes nothing, with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tensor):
        return tensor * self.scale


def bias_net(parametrization):
    """Modules called bias_net and bias, of which tensors called bias and weight are parametrized."""
    model = nn.ModuleDict({"bias_net": nn.Linear(2, 2), "bias": nn.Linear(2, 2, bias=False)})
    for module, name in (
        (model["bias_net"], "bias"),
        (model["bias_net"], "weight"),
        (model["bias"], "weight"),
    ):
        parametrization(module, name)
    return model


@pytest.mark.parametrize(
    "parametrization",
    [
        lambda module, name: parametrize.register_parametrization(module, name, Same()),
        lambda module, name: parametrizations.weight_norm(module, name, dim=None),
        lambda module, name: nn.utils.weight_norm(module, name, dim=None),
        lambda module, name: prune.identity(module, name),
    ],
    ids=["parametrization", "weight_norm", "older weight_norm", "pruning"],
)
def test_a_parametrized_bias_is_a_bias_and_a_parametrized_weight_is_none(parametrization):
    plain = re.compile(r"^bias_net\.(parametrizations\.)?bias[._](original|orig|g|v)")
    names = [name for name, _ in bias_net(parametrization).named_parameters()]
    assert {name for name in names if is_bias(name)} == set(filter(plain.match, names)) != set()
