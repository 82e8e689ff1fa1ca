"""The component that LookSAM reuses, against flat vectors in float64."""

import pytest
import torch

from fairseq_asam.sharpness.reuse import add_component_, orthogonal_component_

SHAPES = [(7, 5), (3,), (2, 3, 4)]


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def test_the_component_is_orthogonal_and_the_rest_is_parallel():
    at_w, perturbed = random_tensors(1), random_tensors(2)
    g, g_s = flat(at_w), flat(perturbed)
    orthogonal_component_(at_w, perturbed)
    g_v = flat(at_w)
    assert abs(g_v @ g) < 1e-5 * g_v.norm() * g.norm()
    rest = g_s - g_v
    assert abs(rest @ g) == pytest.approx((rest.norm() * g.norm()).item(), rel=1e-6)
    assert torch.equal(flat(perturbed), g_s)


def test_the_component_is_added_at_the_length_of_the_gradient():
    gradients, component = random_tensors(1), random_tensors(2)
    g, g_v = flat(gradients), flat(component)
    add_component_(gradients, component, alpha=0.7)
    added = flat(gradients) - g
    assert added.norm() == pytest.approx(0.7 * g.norm().item(), rel=1e-6)
    assert torch.cosine_similarity(added, g_v, 0) == pytest.approx(1.0)


def test_nothing_is_divided_by_zero():
    zeros, perturbed = [torch.zeros(shape) for shape in SHAPES], random_tensors(2)
    orthogonal_component_(zeros, perturbed)
    assert torch.equal(flat(zeros), flat(perturbed))
    same = [g * 0.3 for g in random_tensors(2)]
    orthogonal_component_(same, perturbed)  # as at rho 0
    assert not flat(same).any()
    add_component_(perturbed, same, alpha=0.7)
    assert torch.equal(flat(perturbed), flat(random_tensors(2)))
