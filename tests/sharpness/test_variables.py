"""Functions that read the loop's variables: refused when these have changed, and only then."""

# What ruff warns of here is what is tested.
# ruff: noqa: B007, B023, F821

import collections
import copy
import functools
import queue
import types

import numpy as np
import pytest
import torch
from torch import nn

from fairseq_asam import Perturbation, SharpnessAware, TwoPasses
from fairseq_asam.sharpness.directions import Random

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
    count, total, seen, losses = 0, 0.0, True, []

    def evaluate(inputs):
        nonlocal count, total, seen
        loss = of(model, inputs) * factor
        count, total, seen = count + 1, total + loss.item(), True
        losses.append(loss)
        return loss

    for inputs in BATCHES:
        factor = float(len(BATCHES)) / 3
        at_w(evaluate, inputs)
        count, total, seen = 0, 0.0, False
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


def loss_that_a_callback_keeps(model, at_w):
    last = of(model, BATCHES[0])
    model.zero_grad()

    def keep(loss):
        nonlocal last
        last = loss

    callbacks = [keep]

    def evaluate(inputs):
        assert last.isfinite()
        loss = of(model, inputs)
        for callback in callbacks:
            callback(loss)
        return loss

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
        loss_that_a_callback_keeps,
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


def a_global_in_a_lambda(model, at_w):
    for globals()["inputs"] in BATCHES:
        at_w(reads_a_global_in_a_lambda, model)


def reads_a_global_in_a_lambda(model):
    return (lambda: of(model, inputs))()


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


def attribute_in_a_lambda_in_a_closure(model, at_w):
    trainer = Trainer(model)
    for trainer.inputs in BATCHES:
        at_w(lambda: (lambda: of(model, trainer.inputs))())


def attribute_of_a_callable(model, at_w):
    trainer = Trainer(model)
    for trainer.inputs in BATCHES:
        at_w(trainer)


def function_made_anew(model, at_w):
    def evaluate():
        return of(model, inputs())

    def that_returns(each):
        return lambda: each

    for each in BATCHES:
        inputs = that_returns(each)
        at_w(evaluate)


class WithProperty(Trainer):
    @property
    def half(self):
        return 0.5 * self.inputs

    def of_batch(self):
        return of(self.model, self.half)


def attribute_behind_a_property(model, at_w):
    trainer = WithProperty(model)
    for trainer.inputs in BATCHES:
        at_w(trainer.evaluate)


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
        a_global_in_a_lambda,
        overwritten,
        argument_overwritten,
        dictionary_filled_anew,
        attribute,
        attribute_in_a_closure,
        attribute_in_a_lambda_in_a_closure,
        attribute_of_a_callable,
        attribute_behind_a_property,
        function_made_anew,
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
    direction = Random()
    two_passes = TwoPasses(Perturbation(model.named_parameters(), 0.0, direction=direction), [model])
    two_passes.one_pass(of, model, BATCHES[0])
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
        with pytest.raises(RuntimeError, match=r"(an argument|inputs) of shape \(16, 5\) in place.*a copy"):
            two_passes(lambda a: of(model, a["inputs"] if isinstance(a, dict) else a), *arguments)

    def halve(array):
        array *= 0.5
        return of(model, torch.tensor(array))

    with pytest.raises(RuntimeError, match=r"an argument of shape \(16, 5\) in place.*a copy"):
        two_passes(halve, batch().numpy())


# One object that takes each batch in turn. A function returns how to fill it and how to read it.


def in_dict():
    holder = {}
    return lambda b: holder.update(inputs=b), lambda: holder["inputs"]


def in_list():
    holder = []
    return lambda b: holder.__setitem__(slice(None), [b]), lambda: holder[0]


def in_object_within_object():
    trainer = types.SimpleNamespace(state=types.SimpleNamespace())
    return lambda b: setattr(trainer.state, "inputs", b), lambda: trainer.state.inputs


@pytest.mark.parametrize("kind", [in_dict, in_list, in_object_within_object])
def test_a_batch_that_the_loop_puts_where_the_function_finds_it_is_refused(kind):
    model = plain_network()
    two_passes, (fill, read) = two_passes_of(model), kind()
    for inputs in BATCHES:
        fill(inputs)
        two_passes.at_w(lambda: of(model, read()))
    with pytest.raises(RuntimeError, match="changed between a pass at w and its pass at w"):
        two_passes.at_w_plus_epsilon()


def test_what_the_function_itself_puts_into_a_dict_may_change():
    model, log = plain_network(), {"loss": None, "number": torch.zeros(3)}
    two_passes = two_passes_of(model)

    def evaluate(inputs):
        log["loss"] = loss = of(model, inputs)
        log["number"] = log["number"] + 1
        return loss

    for inputs in BATCHES:
        two_passes.at_w(evaluate, inputs)
        log.clear()
        log["number"] = torch.zeros(3)
    two_passes.at_w_plus_epsilon()
    assert_close(gradients(model), by_hand(model, BATCHES, BATCHES))


@pytest.mark.parametrize("make", [types.SimpleNamespace, dict, collections.UserDict])
def test_a_batch_object_that_the_loop_fills_again_is_refused(make):
    model, holder = plain_network(), make()
    two_passes = two_passes_of(model)
    for inputs in BATCHES:
        vars_of(holder).update(inputs=inputs)
        two_passes.at_w(lambda holder: of(model, vars_of(holder)["inputs"]), holder)
    with pytest.raises(RuntimeError, match="inputs changed between"):
        two_passes.at_w_plus_epsilon()


def vars_of(holder):
    return vars(holder) if isinstance(holder, types.SimpleNamespace) else holder


def test_an_array_of_numpy_that_the_loop_fills_again_is_refused():
    model, array = plain_network(), np.zeros((16, 5))
    two_passes = two_passes_of(model)
    for inputs in BATCHES:
        array[:] = inputs
        two_passes.at_w(lambda a: of(model, torch.tensor(a)), array)
    with pytest.raises(RuntimeError, match="an argument changed between"):
        two_passes.at_w_plus_epsilon()


def replace(holder):
    vars_of(holder)["inputs"] = 0.5 * vars_of(holder)["inputs"]
    return vars_of(holder)["inputs"]


def take_out(holder):
    return vars_of(holder).pop("inputs") * 0.5


@pytest.mark.parametrize("change", [replace, take_out])
@pytest.mark.parametrize("make", [types.SimpleNamespace, dict, collections.UserDict])
def test_both_passes_get_the_batch_that_a_dict_or_an_object_held_before(make, change):
    model, holder = plain_network(), make(inputs=batch())
    two_passes_of(model)(lambda b: of(model, change(b)), holder)
    assert_close(gradients(model), by_hand(model, [0.5 * batch()], [0.5 * batch()]))


class Prefetcher:
    def __init__(self, batches):
        self.left = list(batches)

    def next(self):
        return self.left.pop(0)


def from_queue():
    source = queue.Queue()
    for each in BATCHES:
        source.put(each)
    return lambda: source.get()


def from_deque():
    return collections.deque(BATCHES).popleft


def from_list():
    source = list(BATCHES)
    return lambda: source.pop()


def from_dict():
    source = {"inputs": BATCHES[0], "other": None}
    return lambda: source.pop("inputs", BATCHES[1])


def from_prefetcher():
    source = Prefetcher(BATCHES)
    return lambda: source.next()


def from_iterator_in_dict():
    source = {"batches": iter(BATCHES)}
    return lambda: next(source["batches"])


def from_method_of_iterator():
    return iter(BATCHES).__next__


SOURCES = [
    from_queue,
    from_deque,
    from_list,
    from_dict,
    from_prefetcher,
    from_iterator_in_dict,
    from_method_of_iterator,
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_function_that_takes_each_batch_out_of_something_is_refused(source):
    model, take = plain_network(), source()
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(RuntimeError, match=r"at_w\(function, batch\)"):
        two_passes_of(model)(lambda: of(model, take()))
    assert all(map(torch.equal, model.parameters(), before))


def test_a_closure_that_masks_its_inputs_in_place_is_refused():
    model, inputs = plain_network(), batch()
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), 0.1), model, rho=0.5)

    def closure():
        optimizer.zero_grad()
        labels = inputs.clone()
        inputs[:, 0] = 0.0
        loss = (model(inputs).mean(1) - labels.mean(1)).square().mean()
        loss.backward()
        return loss

    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(RuntimeError, match=r"changed inputs of shape \(16, 5\) in place.*a copy"):
        optimizer.step(closure)
    assert all(map(torch.equal, model.parameters(), before))


class Total(nn.Linear):
    """Adds up its outputs in a buffer."""

    def __init__(self):
        super().__init__(5, 4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, inputs):
        outputs = super().forward(inputs)
        self.total.add_(outputs.detach().sum(0))
        return outputs


def test_buffers_that_the_function_reads_from_a_list_may_change_in_place():
    model = Total().double()
    buffers, at_w = list(model.buffers()), copy.deepcopy(model)(batch()).detach().sum(0)
    two_passes_of(model)(lambda: of(model, batch() + 0 * buffers[0].mean()))
    torch.testing.assert_close(model.total, at_w)


@pytest.mark.parametrize("holder", [list, tuple, lambda pair: dict(enumerate(pair))])
def test_modules_in_a_container_that_the_function_reads_count(holder):
    heads = holder([nn.Linear(5, 5).double(), nn.BatchNorm1d(5).double()])
    model = plain_network()
    two_passes = two_passes_of(model)

    def evaluate():
        return of(model, heads[1](heads[0](batch())))

    for number in range(1, 4):
        two_passes(evaluate)
        assert heads[1].num_batches_tracked == number


def test_a_weight_in_a_dict_that_the_loss_gets_later_counts():
    model, options, temperature = plain_network(), {"temperature": 2.0}, torch.tensor(2.0, requires_grad=True)
    two_passes = two_passes_of(model)

    def evaluate():
        loss = (model(batch()) * options["temperature"]).square().mean()
        loss.backward()
        return loss

    two_passes(evaluate)
    two_passes(evaluate)
    options["temperature"] = temperature
    loss_at_w = two_passes(evaluate).item()
    # The loss is a multiple of temperature^2, so its derivative is 2 / temperature times the loss.
    assert temperature.grad.item() == pytest.approx(loss_at_w + two_passes.sharpness.item(), rel=1e-6)


@pytest.mark.parametrize("retain_graph", [True, False])
def test_what_was_computed_from_the_weights_before_the_pass_is_refused(retain_graph):
    encoder, head = nn.Linear(5, 4), nn.Linear(4, 3)
    model = nn.Sequential(encoder, head).double()
    features = encoder(batch())

    def evaluate(features):
        loss = head(features).square().mean()
        loss.backward(retain_graph=retain_graph)
        return loss

    with pytest.raises(RuntimeError, match=r"shape \(16, 4\) that was computed from the weights before"):
        two_passes_of(model)(evaluate, features)
    two_passes_of(model)(evaluate, features.detach())


@pytest.mark.filterwarnings("error")  # torch warns of asking a loss for its gradient
def test_losses_of_earlier_updates_may_stay_in_what_the_function_reads():
    model, kept = nn.Linear(5, 3).double(), {"scale": 1.0}
    two_passes, losses = two_passes_of(model), []

    def evaluate(inputs):
        loss = of(model, inputs) * kept["scale"]
        losses.append(loss)
        return loss

    for inputs in BATCHES:
        kept["loss"] = two_passes(evaluate, inputs)
        assert two_passes.sharpness > 0


def test_a_function_may_take_the_batch_out_of_a_list_that_it_is_given():
    model = plain_network()
    two_passes_of(model)(lambda held: of(model, held.pop()), [batch()])
    assert_close(gradients(model), by_hand(model, [batch()], [batch()]))


def test_what_the_last_run_of_the_function_has_changed_is_its_own():
    model, state = plain_network(), types.SimpleNamespace(runs=0)
    two_passes = two_passes_of(model)

    def evaluate(inputs):
        if inputs is BATCHES[-1]:
            setattr(state, "runs", state.runs + 1)  # noqa: B010 (its code does not name what it writes)
        return of(model, inputs)

    for inputs in BATCHES:
        two_passes.at_w(evaluate, inputs)
    state.runs = 0
    two_passes.at_w_plus_epsilon()
    assert_close(gradients(model), by_hand(model, BATCHES, BATCHES))


def test_a_function_may_write_to_a_file(tmp_path):
    model = plain_network()
    with open(tmp_path / "log", "w") as log:

        def evaluate(inputs):
            loss = of(model, inputs)
            print(loss.item(), file=log)
            return loss

        two_passes_of(model)(evaluate, batch())
    assert len((tmp_path / "log").read_text().splitlines()) == 2
