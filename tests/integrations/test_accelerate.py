"""A loop of accelerate, sharpness-aware, against a plain loop of Algorithm 1."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType

from fairseq_asam import DIRECTIONS, Perturbation, SharpnessAware
from fairseq_asam.integrations.accelerate import AccumulatingTwoPasses
from tests.algorithm1 import Net, algorithm_1, assert_close, assert_far, examples, note_gradient
from tests.processes import started


def batches_of(process=0, processes=1):
    """Four batches of an epoch for each process."""
    inputs, labels = examples(16 * processes)
    mine = slice(process, None, processes)
    return list(zip(inputs[mine].split(4), labels[mine].split(4)))


def train(accelerator, batches, rho=0.3, epochs=2, loss=F.cross_entropy, clip=None, **settings):
    """Train a model, and return it and the sharpness of each update."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    direction = DIRECTIONS[settings.pop("direction", "gradient")](optimizer, number=lambda: len(seen))
    perturbation = Perturbation(prepared.named_parameters(), rho, direction=direction)
    two_passes = AccumulatingTwoPasses(accelerator, prepared, perturbation, **settings)
    seen = []

    def forward_and_backward(inputs, labels):
        value = loss(prepared(inputs), labels)
        accelerator.backward(value)
        return value

    for inputs, labels in batches * epochs:
        with accelerator.accumulate(prepared):
            two_passes(forward_and_backward, inputs, labels)
            if accelerator.sync_gradients and clip:
                accelerator.clip_grad_norm_(prepared.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            seen.append(two_passes.sharpness)
    return model, seen


def loss_of(model, batch, update):
    return F.cross_entropy(model(batch[0]), batch[1]) / len(update)


def reference(updates, **options):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, algorithm_1(model, optimizer, updates, loss_of, **{"rho": 0.3, **options})


SETTINGS = [{}, {"direction": "momentum"}, {"direction": "random"}, {"ascent_scope": "micro-batch"}]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_weights_are_those_of_algorithm_1(settings, accumulated):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    model, sharpness = train(accelerator, batches_of(), epochs=accumulated, **settings)
    batches = batches_of() * accumulated
    updates = [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)]
    plain, losses = reference(updates, **settings)
    assert len(updates) == 4
    assert_close(model, plain)
    assert_far(model, reference(updates, rho=0.0)[0])
    if not settings:
        sums = [accumulated * (at_w_plus_epsilon - at_w) for at_w, at_w_plus_epsilon in losses]
        assert [value.item() for value in sharpness] == pytest.approx(sums, rel=1e-9)


def test_only_the_last_gradient_is_clipped():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, _ = train(accelerator, batches_of(), clip=0.1)
    batches = batches_of() * 2
    plain, _ = reference(
        [batches[i : i + 2] for i in range(0, 8, 2)],
        clip=lambda weights: torch.nn.utils.clip_grad_norm_(weights, 0.1),
    )
    assert_close(model, plain)


def train_in_one_of_two(rank, count, port):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    weights = []
    for settings in SETTINGS:
        model, _ = train(accelerator, batches_of(rank, count), **settings)
        weights.append({name: w.tolist() for name, w in model.state_dict().items()})
    return weights


def test_two_processes_are_algorithm_1_with_the_batches_of_both():
    both = started(2, train_in_one_of_two)
    assert both[0] == both[1]
    first, second = (batches_of(rank, 2) * 2 for rank in range(2))
    updates = [first[i : i + 2] + second[i : i + 2] for i in range(0, 8, 2)]
    for settings, weights in zip(SETTINGS, both[0]):
        plain, _ = reference(updates, **settings)
        for name, w in plain.state_dict().items():
            torch.testing.assert_close(torch.tensor(weights[name], dtype=w.dtype), w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [3, 4], ids=["at w", "at w + epsilon"])
def test_a_gradient_that_overflows_in_either_pass_skips_the_update(bad):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    passes, gradients = [], []

    def loss(outputs, labels):
        passes.append(None)
        note_gradient(outputs, gradients)
        return F.cross_entropy(outputs, labels) * (float("inf") if len(passes) == bad else 1.0)

    model, _ = train(accelerator, batches_of()[:2], epochs=1, loss=loss)
    assert_close(model, reference([[batch] for batch in batches_of()[:1]])[0])
    assert len(gradients) == 4 and min(gradients) > 1  # they are scaled


def test_a_step_with_a_closure_is_refused_where_micro_batches_are_dropped():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, before = Net(), Net()
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3)
    model, optimizer = accelerator.prepare(model, optimizer)
    with pytest.raises(RuntimeError, match=r"over 2 micro-batches, .* drops the others: use AccumulatingTwo"):
        for inputs, labels in batches_of():

            def closure(inputs=inputs, labels=labels):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                return loss

            with accelerator.accumulate(model):
                optimizer.step(closure)
    assert_close(model, before, 0.0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (DistributedType.DEEPSPEED, "accelerate is to use DEEPSPEED, which keeps gradients to itself"),
        (DistributedType.MEGATRON_LM, "accelerate is to use MEGATRON_LM"),
        (DistributedType.FSDP, "accelerate is to use FSDP with fsdp_version 1, .*: set fsdp_version to 2"),
    ],
)
def test_what_divides_a_model_is_refused(kind, said, monkeypatch):
    accelerator, model = Accelerator(cpu=True), Net()
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ValueError, match=said):
        AccumulatingTwoPasses(accelerator, model, Perturbation(model.named_parameters(), 0.1))


def test_an_unknown_scope_is_refused():
    accelerator, model = Accelerator(cpu=True), Net()
    with pytest.raises(
        ValueError, match="ascent_scope is 'batch', but it must be one of update, micro-batch"
    ):
        AccumulatingTwoPasses(accelerator, model, Perturbation(model.named_parameters(), 0.1), "batch")


def test_a_random_direction_is_one_of_the_update_without_a_number_too():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    perturbation = Perturbation(model.named_parameters(), 0.3, direction=DIRECTIONS["random"](seed=1))
    two_passes, seen = AccumulatingTwoPasses(accelerator, model, perturbation), []

    def forward_and_backward(inputs, labels):
        seen.append(model.first.weight.detach().clone())
        loss = F.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        return loss

    for inputs, labels in batches_of():
        with accelerator.accumulate(model):
            two_passes(forward_and_backward, inputs, labels)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])
