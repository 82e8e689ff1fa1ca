"""Functions that read the loop's variables: refused when these have changed, and only then."""

# What ruff warns of here is what is tested.
# ruff: noqa: B007, B023, F821

import functools

import pytest
import torch
from torch import nn

from .test_two_passes import assert_close, batch, by_hand, gradients, plain_network, two_passes_of

BATCHES = [batch(1), batch(2), batch(3)]


def of(model, inputs):
    loss = model(inputs).square().mean()
    loss.backward()
    return loss


# Loops over micro-batches. Each calls at_w() for every one.


def arguments(model, at_w):
    for inputs in BATCHES:
        at_w(of, model, inputs)


def partial(model, at_w):
    for inputs in BATCHES:
        at_w(functools.partial(of, model, inputs))


def defaults(model, at_w):
    for inputs in BATCHES:

        def evaluate(inputs=inputs):
            return of(model, inputs)

        at_w(evaluate)


def own_counters(model, at_w):
    """Reset by the loop, which the function writes too; and a number that is equal in each turn."""
    count, total, losses = 0, 0.0, []

    def evaluate(inputs):
        nonlocal count, total
        loss = of(model, inputs) * factor
        count, total = count + 1, total + loss.item()
        losses.append(loss)
        return loss

    for inputs in BATCHES:
        factor = float(len(BATCHES)) / 3
        at_w(evaluate, inputs)
        count, total = 0, 0.0
        losses.clear()


def counter_of_a_helper(model, at_w):
    count = 0

    def counts():
        nonlocal count
        count += 1

    def evaluate(inputs):
        counts()
        assert count
        return of(model, inputs)

    for inputs in BATCHES:
        at_w(evaluate, inputs)


def tensor_of_its_own(model, at_w):
    seen = torch.zeros(())

    def evaluate(inputs, total):
        seen.add_(1)
        total.add_(1)
        return of(model, inputs)

    total = torch.zeros(())
    for inputs in BATCHES:
        at_w(evaluate, inputs, total)


class Meter:
    def __init__(self, model):
        self.model, self.count = model, 0

    def evaluate(self, inputs):
        self.count += 1
        return of(self.model, inputs)


def attribute_of_its_own(model, at_w):
    meter = Meter(model)
    for inputs in BATCHES:
        at_w(meter.evaluate, inputs)
        meter.count = 0


@pytest.mark.parametrize(
    "loop",
    [
        arguments,
        partial,
        defaults,
        own_counters,
        counter_of_a_helper,
        tensor_of_its_own,
        attribute_of_its_own,
    ],
)
def test_what_stays_or_is_the_function_s_own_is_no_matter(loop):
    model = plain_network()
    two_passes = two_passes_of(model)
    loop(model, two_passes.at_w)
    two_passes.at_w_plus_epsilon()
    assert_close(gradients(model), by_hand(model, BATCHES, BATCHES))


def closure(model, at_w):
    for inputs in BATCHES:

        def evaluate():
            return of(model, inputs)

        at_w(evaluate)


def closure_of_one_definition(model, at_w):
    def evaluate():
        return of(model, inputs)

    for inputs in BATCHES:
        at_w(evaluate)


def partial_of_a_closure(model, at_w):
    for inputs in BATCHES:
        at_w(functools.partial(lambda model: of(model, inputs), model))


def partial_overwritten(model, at_w):
    inputs = torch.zeros_like(BATCHES[0])
    for each in BATCHES:
        at_w(functools.partial(of, model, inputs.copy_(each)))


def function_in_a_function(model, at_w):
    for inputs in BATCHES:

        def forward():
            return model(inputs).square().mean()

        def evaluate():
            loss = forward()
            loss.backward()
            return loss

        at_w(evaluate)


def decorated(model, at_w):
    for inputs in BATCHES:

        @torch.enable_grad()
        def evaluate():
            return of(model, inputs)

        at_w(evaluate)


def comprehension(model, at_w):
    for inputs in BATCHES:
        at_w(lambda: sum([of(model, each) for each in [inputs]]))


def deleted(model, at_w):
    for inputs in BATCHES:
        at_w(lambda: of(model, inputs))
        del inputs


def module_s_globals(model, at_w):
    for globals()["inputs"] in BATCHES:
        at_w(reads_globals, model)


def reads_globals(model):
    return reads_more(model)


def reads_more(model):
    return of(model, globals_inputs())


def globals_inputs():
    return inputs


def overwritten(model, at_w):
    inputs = torch.zeros_like(BATCHES[0])
    for each in BATCHES:
        inputs.copy_(each)
        at_w(lambda: of(model, inputs))


def argument_overwritten(model, at_w):
    inputs = torch.zeros_like(BATCHES[0])
    for each in BATCHES:
        inputs.copy_(each)
        at_w(of, model, inputs)


def dictionary_filled_anew(model, at_w):
    sample = {}
    for sample["inputs"] in BATCHES:
        at_w(lambda sample: of(model, sample["inputs"]), sample)


class Trainer:
    def __init__(self, model):
        self.model = model

    def evaluate(self):
        return self.of_batch()

    def of_batch(self):
        return of(self.model, self.inputs)

    __call__ = evaluate


def attribute(model, at_w):
    trainer = Trainer(model)
    for trainer.inputs in BATCHES:
        at_w(trainer.evaluate)


def attribute_in_a_closure(model, at_w):
    trainer = Trainer(model)
    for trainer.inputs in BATCHES:
        at_w(lambda: of(model, trainer.inputs))


def attribute_of_a_callable(model, at_w):
    trainer = Trainer(model)
    for trainer.inputs in BATCHES:
        at_w(trainer)


@pytest.mark.parametrize(
    "loop",
    [
        closure,
        closure_of_one_definition,
        partial_of_a_closure,
        partial_overwritten,
        function_in_a_function,
        decorated,
        comprehension,
        deleted,
        module_s_globals,
        overwritten,
        argument_overwritten,
        dictionary_filled_anew,
        attribute,
        attribute_in_a_closure,
        attribute_of_a_callable,
    ],
)
def test_a_function_that_would_run_over_another_batch_is_refused_before_any_weight_moves(loop):
    model = plain_network()
    two_passes = two_passes_of(model)
    before = [weight.detach().clone() for weight in model.parameters()]
    loop(model, two_passes.at_w)
    with pytest.raises(RuntimeError, match=r"(inputs|an argument) changed between .* at_w\(function, inputs"):
        two_passes.at_w_plus_epsilon()
    assert all(w.grad is None and torch.equal(w, b) for w, b in zip(model.parameters(), before))


def test_a_function_defined_in_the_loop_serves_where_both_passes_come_at_once():
    model = plain_network()
    two_passes = two_passes_of(model)
    for inputs in BATCHES:
        model.zero_grad()
        two_passes(lambda: of(model, inputs))
        assert_close(gradients(model), by_hand(model, [inputs], [inputs]))


def test_one_pass_at_w_plus_epsilon_gets_the_batch_too():
    model = nn.Linear(5, 3).double()
    two_passes = two_passes_of(model, rho=0.0)
    of(model, BATCHES[0])
    model.zero_grad(set_to_none=False)
    two_passes.only_at_w_plus_epsilon(of, model, BATCHES[0])
    plain = gradients(model)
    model.zero_grad()
    of(model, BATCHES[0])
    assert_close(gradients(model), plain)


@pytest.mark.parametrize("read_by", ["closure", "object"])
def test_a_function_that_takes_the_next_batch_itself_is_refused(read_by):
    model, trainer = plain_network(), Trainer(None)
    trainer.batches = batches = iter(BATCHES)

    def evaluate():
        return of(model, next(batches if read_by == "closure" else trainer.batches))

    with pytest.raises(RuntimeError, match=r"reads the iterator batches.*at_w\(function, batch\)"):
        two_passes_of(model)(evaluate)
    assert len(list(batches)) == len(BATCHES)


def test_an_argument_that_the_pass_at_w_changes_in_place_is_refused():
    model = nn.Sequential(nn.Dropout(0.5, inplace=True), *plain_network())
    two_passes = two_passes_of(model)
    for arguments in ((batch(),), ({"inputs": batch()},)):
        with pytest.raises(RuntimeError, match=r"an argument of shape \(16, 5\) in place.*a copy"):
            two_passes(lambda a: of(model, a["inputs"] if isinstance(a, dict) else a), *arguments)
