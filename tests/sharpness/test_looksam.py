"""The component that LookSAM reuses, against flat vectors in float64."""

import math

import pytest
import torch

from fairseq_asam.sharpness.looksam import add_component_, orthogonal_component_

SHAPES = [(7, 5), (3,), (2, 3, 4)]


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


@pytest.mark.parametrize("unit", [1.0, 0.01])
def test_the_component_is_orthogonal_and_as_long_as_the_tangent_of_the_angle(unit):
    """In whatever unit the gradient at w is."""
    at_w, perturbed = [unit * g for g in random_tensors(1)], random_tensors(2)
    g, g_s = flat(at_w), flat(perturbed)
    orthogonal_component_(at_w, perturbed)
    g_v = flat(at_w)
    assert abs(g_v @ g) < 1e-5 * g_v.norm() * g.norm()
    cosine = torch.cosine_similarity(g, g_s, 0)
    assert g_v.norm().item() == pytest.approx(abs(cosine.acos().tan().item()), rel=1e-5)
    # g, g_s and g_v are in one plane
    rest = g_s - (g_s @ g_v / g_v.norm() ** 2) * g_v
    assert abs(rest @ g) == pytest.approx((rest.norm() * g.norm()).item(), rel=1e-6)
    assert torch.equal(flat(perturbed), g_s)


@pytest.mark.parametrize("alpha, factor", [(0.7, 0.7), (None, 1.0), (None, 0.3)])
def test_the_component_is_added_at_the_length_of_the_gradient(alpha, factor):
    """Times alpha, or the component's own length where that is less than 1."""
    gradients, component = random_tensors(1), random_tensors(2)
    if alpha is None and factor < 1:
        length = flat(component).norm().item()
        component = [g_v * factor / length for g_v in component]
    g, g_v = flat(gradients), flat(component)
    add_component_(gradients, component, alpha)
    added = flat(gradients) - g
    assert added.norm().item() == pytest.approx(factor * g.norm().item(), rel=1e-6)
    assert torch.cosine_similarity(added, g_v, 0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_of_a_gradient_that_is_not_finite_nothing_is_reused(bad, which):
    """One update that overflowed must not spoil those that would reuse it."""
    tensors = random_tensors(1), random_tensors(2)
    tensors[which][1].view(-1)[0] = bad
    component, perturbed = tensors
    orthogonal_component_(component, perturbed)
    assert not flat(component).any()


def test_nothing_is_divided_by_zero():
    zeros, perturbed = [torch.zeros(shape) for shape in SHAPES], random_tensors(2)
    orthogonal_component_(zeros, perturbed)
    assert not flat(zeros).any()
    same = [g * 0.3 for g in random_tensors(2)]
    orthogonal_component_(same, perturbed)  # as at rho 0
    assert not flat(same).any()
    for alpha in (None, 0.7):
        add_component_(perturbed, same, alpha)
    assert torch.equal(flat(perturbed), flat(random_tensors(2)))
