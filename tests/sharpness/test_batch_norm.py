"""Batch-normalization statistics that the pass at w + epsilon leaves alone."""

import copy

import pytest
import torch
from torch import nn

from fairseq_asam import Perturbation, frozen_batch_norm_statistics


def network(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten(), nn.LazyLinear(2)
    )


def images(seed=1):
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_output_is_that_of_training_mode_and_the_statistics_stay(momentum):
    model = network(momentum)
    expected = model(images())
    assert model[1].num_batches_tracked == 1
    before = statistics(model)
    with frozen_batch_norm_statistics(model):
        output = model(images())
    assert torch.equal(output, expected)
    assert_same(statistics(model), before)

    model(images(seed=2))
    assert model[1].num_batches_tracked == 2
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_evaluation_mode_uses_the_running_statistics():
    model = network()
    model(images())
    model.eval()
    expected = model(images(seed=2))
    with frozen_batch_norm_statistics(model):
        assert torch.equal(model(images(seed=2)), expected)


def test_nested_and_interrupted_blocks_restore_only_what_they_changed():
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3)
    )
    with frozen_batch_norm_statistics(model):
        with pytest.raises(KeyboardInterrupt), frozen_batch_norm_statistics(model):
            raise KeyboardInterrupt
        assert not model[0].track_running_stats
    assert [layer.track_running_stats for layer in model] == [True, False, False]


def test_an_instance_norm_that_evaluates_is_left_alone():
    model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True))
    model(images())
    model.eval()
    expected = model(images(seed=2))
    with frozen_batch_norm_statistics(model):
        assert torch.equal(model(images(seed=2)), expected)


def test_statistics_after_a_sharpness_aware_update_are_those_at_w():
    model = network()
    model(images())
    at_w = copy.deepcopy(model)
    at_w(images(seed=2))
    perturbation = Perturbation(model.named_parameters(), rho=0.5)
    model(images(seed=2)).square().mean().backward()
    with perturbation, frozen_batch_norm_statistics(model):
        model(images(seed=2)).square().mean().backward()
    assert_same(statistics(model), statistics(at_w))
