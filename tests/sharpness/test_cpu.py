"""What is for CPUs alone: the fast form of T^2 g against the diagonal of T, and blocks of weights in it."""

import numpy as np
import pytest
import torch

from fairseq_asam.sharpness.cpu import FAST, FastBlock
from fairseq_asam.sharpness.kernels import Ascent

ETA = 0.5


@pytest.mark.parametrize("operator", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_form_is_that_of_the_diagonal(operator, dtype):
    torch.manual_seed(0)
    weights, gradient = [torch.randn(n, dtype=dtype) for n in (7, 9)], torch.randn(16, dtype=dtype)
    diagonal = torch.cat(operator.diagonal(weights, ETA) or [torch.ones(16, dtype=dtype)])
    minus_eta = torch.tensor(-ETA, dtype=dtype)
    for flat in (weights, [torch.cat(weights)]):
        direction = FAST[operator](gradient, flat, minus_eta, torch.empty(16, dtype=dtype))
        torch.testing.assert_close(direction, diagonal**2 * gradient)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("operator", FAST)
def test_a_fast_block_keeps_its_weights_if_the_norm_is_not_finite(in_place, operator):
    """Where some weights are on an accelerator, the host does not read the norm."""
    block = FastBlock(operator, ETA)
    weight, gradient = torch.ones(3), torch.tensor([1.0, np.inf, np.nan])
    block.append(0, weight, weight)
    block.in_place = in_place
    block.use(torch.empty(3), False)
    block.norms([gradient], 2.0, None)
    block.move([gradient], Ascent(0.5, 2.0, torch.tensor(0.0), torch.tensor(True)), lambda *tensors: None)
    assert torch.equal(weight if in_place else block.copy, torch.ones(3))
