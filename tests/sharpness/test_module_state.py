"""Buffers: the pass at w changes them, and the pass at w + epsilon does not."""

import pytest
from torch.nn.modules.module import _global_forward_pre_hooks

from .test_two_passes import (
    STATEFUL,
    assert_same,
    batch,
    buffers,
    forward_and_backward,
    network,
    seed,
    two_passes_of,
)


@pytest.mark.parametrize("known", [True, False], ids=["modules given", "modules that run"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_the_buffers_are_those_that_the_pass_at_w_leaves(kind, known):
    model, plain = network(kind), network(kind)
    tensors = dict(model.named_buffers())
    two_passes = two_passes_of(model, known=known)
    for step in range(2):
        seed()
        two_passes(forward_and_backward(model, batch(step)))
        assert two_passes.sharpness > 0
        seed()
        plain(batch(step))
        assert_same(buffers(model), buffers(plain))
    if kind != "buffer made anew":
        assert all(buffer is tensors[name] for name, buffer in model.named_buffers())
    assert not _global_forward_pre_hooks


def test_an_evaluating_layer_evaluates():
    model = network("batch normalization")
    model(batch())
    model.eval()
    before = buffers(model)
    two_passes_of(model)(forward_and_backward(model, batch()))
    assert_same(buffers(model), before)
