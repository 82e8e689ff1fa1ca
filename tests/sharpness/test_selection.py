"""Which weights are perturbed."""

import pytest
import torch
from torch import nn

from fairseq_asam import Perturbation, selected_parameters


class Standardized(nn.BatchNorm1d):
    """Batch normalization by another name."""


class Translator(nn.Module):
    """Every kind of layer, and an output projection that is the embedding."""

    def __init__(self):
        super().__init__()
        self.lookup = nn.Embedding(7, 4)
        self.embed_layer = nn.Linear(4, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.batch_norm = Standardized(4)
        self.output = nn.Linear(4, 7)
        self.output.weight = self.lookup.weight

    def forward(self, tokens):
        return self.output(self.batch_norm(self.layer_norm(self.embed_layer(self.lookup(tokens)))))


@pytest.mark.parametrize(
    "selection, names",
    [
        ("all", "lookup.weight embed_layer.weight embed_layer.bias layer_norm.weight layer_norm.bias "
         "batch_norm.weight batch_norm.bias output.bias"),
        ("normalization-layers", "layer_norm.weight layer_norm.bias batch_norm.weight batch_norm.bias"),
        ("all-but-embeddings", "embed_layer.weight embed_layer.bias layer_norm.weight layer_norm.bias "
         "batch_norm.weight batch_norm.bias output.bias"),
    ],
)  # fmt: skip
def test_only_the_selected_weights_move(selection, names):
    model = Translator()
    assert [name for name, _ in selected_parameters(model, selection)] == names.split()
    model(torch.tensor([1, 2, 3])).square().sum().backward()
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    with Perturbation(selected_parameters(model, selection), rho=0.5, normalization="none"):
        moved = {name for name, w in model.named_parameters() if not torch.equal(w, before[name])}
    assert moved <= set(names.split()) and moved & {"layer_norm.weight"}


def test_a_bag_of_embeddings_is_an_embedding():
    model = nn.Sequential(nn.EmbeddingBag(3, 2), nn.Linear(2, 1))
    names = [name for name, _ in selected_parameters(model, "all-but-embeddings")]
    assert names == ["1.weight", "1.bias"]


class NormedAttention(nn.Linear):
    """No normalization layer, although its name begins like that of one."""


class LearnedNorm(nn.LayerNorm):
    """A normalization layer with a part that is none."""

    def __init__(self, size):
        super().__init__(size)
        self.gate = nn.Linear(size, size)


def test_a_normalization_layer_is_known_by_the_end_of_its_name_and_its_parts_are_not_meant():
    model = nn.Sequential(NormedAttention(4, 4), LearnedNorm(4))
    names = [name for name, _ in selected_parameters(model, "normalization-layers")]
    assert names == ["1.weight", "1.bias"]


def test_an_unknown_selection_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"'some'.*all, normalization-layers, all-but-embeddings"):
        list(selected_parameters(Translator(), "some"))
