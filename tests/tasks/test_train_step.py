"""The step that fairseq's Trainer makes, against the plain reference of Algorithm 1."""

import collections
import copy
import itertools
import math

import pytest
import torch
from fairseq import utils
from fairseq.data.data_utils import compute_mask_indices
from fairseq.logging import metrics

from tests.sharpness.plain_directions import ONE_PASS, TWO_PASSES
from tests.training import FLOAT64_THROUGHOUT, FeatureBatchNorm, configuration, trainer_and_batches

from .reference import Reference

RHO = 0.2


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    for name, replacement in FLOAT64_THROUGHOUT.items():
        monkeypatch.setattr(utils, name, replacement)


def setting(corpus, *flags):
    return trainer_and_batches(configuration(corpus / "bin", *flags))


def reference_of(corpus, *flags, **options):
    """The reference at the same weights, with the flags of the run but ours."""
    return Reference(setting(corpus, "--optimizer", "adam", *flags)[0], rho=RHO, **options)


def assert_same_weights(trainer, reference):
    for (name, w), (_, expected) in zip(
        trainer.model.named_parameters(), reference.trainer.model.named_parameters()
    ):
        torch.testing.assert_close(
            w, expected, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
@pytest.mark.parametrize("optimizer, normalization", [("asam", "element-wise"), ("sam", "none")])
@pytest.mark.parametrize("clip_norm", ["0", "0.05"])
def test_the_step_is_algorithm_1(corpus, scope, optimizer, normalization, clip_norm):
    """Twenty updates of three micro-batches each; the small clip norm bites."""
    flags = ["--ascent-scope", scope, "--rho", str(RHO), "--clip-norm", clip_norm]
    trainer, batches = setting(corpus, "--optimizer", optimizer, *flags)
    reference = reference_of(corpus, "--clip-norm", clip_norm, scope=scope, normalization=normalization)
    assert len(batches) > 8
    for update in range(20):
        micro_batches = [batches[(3 * update + i) % len(batches)] for i in range(3)]
        reference.update(micro_batches)
        assert reference.norm > float(clip_norm)
        trainer.train_step(copy.deepcopy(micro_batches))
        assert_same_weights(trainer, reference)
    assert trainer.get_num_updates() == 20


@pytest.mark.parametrize(
    "direction, normalization",
    [
        *itertools.product(ONE_PASS, ["element-wise", "none", "adam"]),
        *((direction, "adam") for direction in TWO_PASSES),
    ],
)
def test_a_step_in_other_directions_and_in_adam_s_metric(corpus, direction, normalization):
    """Twenty updates of three micro-batches each, with dropout. The first update has no moments.

    Adam's eps is not tiny: 1 / eps magnifies the rounding of gradients that are almost 0.
    """
    masks = ["--dropout", "0.2", "--clip-norm", "0.05", "--adam-eps", "1e-5"]
    flags = ["--optimizer", "asam", "--rho", str(RHO), "--ascent-direction", direction]
    trainer, batches = setting(corpus, *flags, "--normalization", normalization, *masks)
    reference = reference_of(corpus, *masks, normalization=normalization, direction=direction)
    for update in range(20):
        micro_batches = [batches[(3 * update + i) % len(batches)] for i in range(3)]
        reference.update(micro_batches)
        stats = trainer.train_step(copy.deepcopy(micro_batches))
        assert ("sharpness" in stats) == (direction in TWO_PASSES)  # otherwise L(w) is not measured
        assert_same_weights(trainer, reference)


def passes_of(trainer, monkeypatch):
    """The batches that the criterion will see, in their order."""
    criterion, seen = trainer.get_criterion(), []
    forward = criterion.forward
    monkeypatch.setattr(
        criterion, "forward", lambda m, sample, **kw: seen.append(sample) or forward(m, sample, **kw)
    )
    return seen


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
def test_an_ascent_fraction_makes_epsilon_of_a_part_of_each_batch(corpus, scope, monkeypatch):
    flags = ["--ascent-scope", scope, "--rho", str(RHO), "--ascent-fraction", "0.3"]
    trainer, batches = setting(corpus, "--optimizer", "asam", *flags)
    reference = reference_of(corpus, scope=scope, normalization="element-wise")
    padding = trainer.task.target_dictionary.pad()
    seen, drawn = passes_of(trainer, monkeypatch), []
    for update in range(4):
        micro_batches = [batches[2 * update], batches[2 * update + 1]]
        seen.clear()
        with metrics.aggregate() as logged:
            trainer.train_step(copy.deepcopy(micro_batches))
        passes = seen[:]
        if scope == "micro-batch":
            passes = [passes[i] for i in (0, 2, 1, 3)]
        parts, wholes = passes[:2], passes[2:]
        for part, whole, batch in zip(parts, wholes, micro_batches):
            assert torch.equal(whole["id"], batch["id"])
            rows = [batch["id"].tolist().index(i) for i in part["id"].tolist()]
            assert rows == sorted(set(rows))
            assert len(rows) == part["nsentences"] == round(0.3 * len(batch["id"]))
            assert torch.equal(part["target"], batch["target"][rows, : part["target"].size(1)])
            source, tokens = (each["net_input"]["src_tokens"] for each in (part, batch))
            assert torch.equal(source, tokens[rows, -source.size(1) :])  # padding is on the left
            assert part["ntokens"] == (part["target"] != padding).sum()
            drawn.append(tuple(rows))
        tokens = sum(batch["ntokens"] for batch in micro_batches)
        assert logged["wpb"].val == tokens
        assert logged["bsz"].val == sum(len(batch["id"]) for batch in micro_batches)

        reference.update(micro_batches, parts)
        assert_same_weights(trainer, reference)
    assert len(set(drawn)) > 1


def test_the_loss_of_a_fraction_is_that_of_its_sentences(corpus, monkeypatch):
    """Per token, so that it compares with the loss of other runs."""
    trainer, batches = setting(corpus, "--optimizer", "asam", "--ascent-fraction", "0.5")
    reference, _ = setting(corpus, "--optimizer", "adam")
    seen = passes_of(trainer, monkeypatch)
    stats = trainer.train_step(copy.deepcopy(batches[:1]))
    with torch.no_grad():
        loss, _, _ = reference.criterion(reference.model, seen[0])
    assert stats["loss"] == pytest.approx(loss.item() / seen[0]["ntokens"] / math.log(2), abs=2e-3)


@pytest.mark.parametrize("fraction", ["1", "0.5"])
def test_a_criterion_knows_what_it_returns_after_its_first_pass(corpus, fraction):
    """As the criteria of wav2vec, which note it in their forward pass."""
    flags = ["--optimizer", "asam", "--ascent-fraction", fraction]
    trainer, batches = setting(corpus, *flags)
    expected, _ = setting(corpus, *flags)
    criterion = trainer.get_criterion()
    forward = criterion.forward

    def noting_forward(*args, **kwargs):
        criterion.logging_outputs_can_be_summed = lambda: True
        return forward(*args, **kwargs)

    def not_yet_known():
        raise AttributeError("it is not known yet")

    criterion.forward, criterion.logging_outputs_can_be_summed = noting_forward, not_yet_known
    stats = trainer.train_step(copy.deepcopy(batches[:2]))
    assert stats["loss"] == expected.train_step(batches[:2])["loss"]


def test_a_weight_without_elements_is_left_alone(corpus):
    trainer, batches = setting(corpus, "--optimizer", "asam")
    criterion = trainer.get_criterion()
    empty = trainer.get_model().encoder.empty = torch.nn.Parameter(torch.empty(0, dtype=torch.float64))
    trainer._build_optimizer()
    forward = criterion.forward

    def forward_with_empty(model, sample, **kwargs):
        loss, *others = forward(model, sample, **kwargs)
        return loss + empty.sum(), *others

    criterion.forward = forward_with_empty
    assert trainer.train_step([batches[0]])["sharpness"] > 0


def test_sharpness_is_the_difference_of_two_losses(corpus):
    """In the unit of fairseq's loss column, weighted by the sample size."""
    trainer, batches = setting(corpus, "--optimizer", "asam")

    def loss():
        with torch.no_grad():
            results = [trainer.criterion(trainer.model, batch) for batch in batches[:2]]
        return (sum(r[0] for r in results) / sum(r[1] for r in results)).item() / math.log(2)

    at_w = loss()
    for batch in batches[:2]:
        trainer.criterion(trainer.model, batch)[0].backward()
    with trainer.optimizer.two_passes(trainer).perturbation:
        perturbed = loss()
    stats = trainer.train_step(copy.deepcopy(batches[:2]))
    assert stats["loss"] == pytest.approx(at_w, abs=2e-3)  # fairseq rounds its columns
    assert stats["sharpness"] == pytest.approx(perturbed - at_w, abs=1e-4)


def test_over_several_updates_sharpness_is_weighted_by_their_tokens(corpus):
    """As the loss is."""
    trainer, batches = setting(corpus, "--optimizer", "asam")
    batches = sorted(batches, key=lambda batch: batch["ntokens"])
    values, tokens = [], [batches[0]["ntokens"], batches[-1]["ntokens"]]
    with metrics.aggregate() as interval:
        for batch in (batches[0], batches[-1]):
            with metrics.aggregate() as update:
                trainer.train_step([copy.deepcopy(batch)])
            values.append(float(update["sharpness"].avg))
    assert tokens[0] < tokens[1]
    mean = (values[0] * tokens[0] + values[1] * tokens[1]) / sum(tokens)
    assert float(interval["sharpness"].avg) == pytest.approx(mean, rel=1e-6)


def test_criterions_reduce_the_outputs_that_they_log_themselves(corpus, monkeypatch):
    """Those of both passes, but of one at a time: some, as wav2vec's, log whatever they find."""
    trainer, batches = setting(corpus, "--optimizer", "asam")
    criterion, seen = type(trainer.get_criterion()), []
    own = criterion.reduce_metrics
    monkeypatch.setattr(
        criterion, "reduce_metrics", staticmethod(lambda logs: seen.append(set(*logs)) or own(logs))
    )
    trainer.train_step([batches[0]])
    assert len(seen) >= 2 and all(keys == seen[0] for keys in seen)


@pytest.mark.parametrize("flags", [["--ascent-scope", "micro-batch"], ["--ascent-direction", "momentum"]])
def test_a_model_that_steps_a_moving_average_does_so_at_w(corpus, flags):
    """As data2vec does, whenever a task tells it the number of the update."""
    trainer, batches = setting(corpus, "--optimizer", "asam", *flags)
    model, seen = trainer.get_model(), []
    model.set_num_updates = lambda n: seen.append((n, model.encoder.embed_tokens.weight.detach().clone()))
    at_w = []
    for i in range(3):
        at_w.append(model.encoder.embed_tokens.weight.detach().clone())
        trainer.train_step([batches[i]])
    assert [n for n, _ in seen] == [0, 1, 2]
    assert all(torch.equal(w, seen_w) for w, (_, seen_w) in zip(at_w, seen))


def test_a_model_is_told_of_updates_after_one_that_ran_out_of_memory(corpus):
    """In its pass at w + epsilon, from which such models are kept."""
    trainer, batches = setting(corpus, "--optimizer", "asam")
    criterion, calls = trainer.get_criterion(), []
    forward = criterion.forward

    def out_of_memory_once(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    criterion.forward = out_of_memory_once
    model, told = trainer.get_model(), []
    model.set_num_updates = told.append
    for _ in range(2):
        trainer.train_step([batches[0]])
    assert told == [0, 0] and trainer.get_num_updates() == 1
    assert "backward" not in vars(trainer.optimizer)


def test_a_criterion_may_change_what_its_batch_holds(corpus):
    """Both passes get the same batch. With a radius of 0, the update is then Adam's, and nothing is sharp."""

    def reverse_targets(trainer):
        criterion = trainer.get_criterion()
        forward = criterion.forward

        def changing(model, sample, reduce=True):
            sample["target"] = sample["target"].flip(0)
            sample["net_input"].pop("weight")
            return forward(model, sample, reduce)

        criterion.forward = changing

    logged, weights = {}, {}
    for name, flags in {"adam": [], "asam": ["--rho", "0"]}.items():
        trainer, batches = setting(corpus, "--optimizer", name, *flags)
        reverse_targets(trainer)
        samples = copy.deepcopy(batches[:2])
        for sample in samples:
            sample["net_input"]["weight"] = 0.5
        logged[name] = trainer.train_step(samples)
        weights[name] = [weight.detach().clone() for weight in trainer.get_model().parameters()]
    assert all(map(torch.equal, weights["adam"], weights["asam"]))
    assert logged["asam"]["sharpness"] == 0.0


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
def test_batch_normalization_sees_the_passes_at_w_alone(corpus, scope):
    asam, batches = setting(corpus, "--optimizer", "asam", "--ascent-scope", scope)
    adam, _ = setting(corpus, "--optimizer", "adam")
    for trainer in (asam, adam):
        layer = trainer.get_model().encoder.layer_norm = FeatureBatchNorm(32).double()
        trainer.train_step(copy.deepcopy(batches[:2]))
        assert layer.num_batches_tracked == 2
    theirs = adam.get_model().encoder.layer_norm
    ours = asam.get_model().encoder.layer_norm
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
def test_a_layer_that_the_pass_at_w_plus_epsilon_drops_is_not_stepped(corpus, scope):
    """Layer drop with masks of its own in each pass: a zero gradient would still count as a step of Adam."""
    flags = ["--encoder-layers", "4", "--encoder-layerdrop", "0.5", "--fresh-masks", "--ascent-scope", scope]
    trainer, batches = setting(corpus, "--optimizer", "asam", *flags)
    layers = [trainer.get_model().encoder.layers[i] for i in range(4)]  # to iterate would drop some
    ran = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    steps, dropped = collections.Counter(), 0
    for batch in batches[:12]:
        passes = []
        criterion = trainer.get_criterion()
        forward = type(criterion).forward

        def split(*args, criterion=criterion, forward=forward, passes=passes, **kwargs):
            ran.clear()
            result = forward(criterion, *args, **kwargs)
            passes.append(set(ran))
            return result

        criterion.forward = split
        trainer.train_step([copy.deepcopy(batch)])
        at_w, perturbed = passes
        steps.update(perturbed)
        dropped += bool(at_w - perturbed)
    assert dropped > 0
    state = trainer.optimizer.optimizer.state
    for number, layer in enumerate(layers):
        # fairseq 0.12.2 has weights that no pass uses
        assert {state[w]["step"] for w in layer.parameters() if w in state} == {steps[number]} - {0}


def test_masks_from_fresh_generators_are_the_same_in_both_passes(corpus, monkeypatch):
    """As wav2vec, HuBERT and the CTC models draw them."""
    trainer, batches = setting(corpus, "--optimizer", "asam", "--rho", "0")
    encoder, drawn = trainer.get_model().encoder, []

    def masked(layer, inputs, output):
        drawn.append(compute_mask_indices(output.shape[:2], None, 0.5, 2))
        return output * torch.tensor(drawn[-1])[..., None]

    encoder.layers[0].register_forward_hook(masked)
    with metrics.aggregate() as logged:
        trainer.train_step(copy.deepcopy(batches[:2]))
    assert (drawn[0] == drawn[2]).all() and (drawn[1] == drawn[3]).all()
    assert logged["sharpness"].val == 0.0
