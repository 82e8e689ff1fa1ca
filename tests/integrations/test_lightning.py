"""Lightning's automatic optimization, sharpness-aware, against Algorithm 1 and stock Lightning."""

from __future__ import annotations

import logging
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fairseq_asam import SharpnessAware
from tests.algorithm1 import (
    Net,
    algorithm_1,
    assert_close,
    assert_far,
    examples,
    gradients_of_outputs,
)
from tests.processes import started

pytest.importorskip("lightning")
import lightning
import torchmetrics
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from fairseq_asam.integrations.lightning import SharpnessAwareCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    """A classifier with dropout, batch normalization, metrics and hooks that count."""

    def __init__(self, dropout=0.0, optimizer="sgd"):
        super().__init__()
        self.net, self.optimizer, self.hooks = Net(dropout), optimizer, []
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.examples, self.scores = torchmetrics.SumMetric(), torchmetrics.CatMetric()
        self.losses = []

    def training_step(self, batch, number):
        inputs, labels = batch
        outputs = self.net(inputs)
        loss = F.cross_entropy(outputs, labels)
        self.accuracy(outputs, labels)
        self.examples(len(labels))
        self.scores(outputs.detach().amax(1))
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"examples": self.examples, "loss": loss}, on_step=False, on_epoch=True)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        if self.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=0.05)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_before_zero_grad(self, optimizer):
        self.hooks.append("zero_grad")

    def on_before_backward(self, loss):
        self.hooks.append("backward")

    def on_after_backward(self):
        self.hooks.append("gradient")
        self.last = [None if w.grad is None else w.grad.clone() for w in self.net.parameters()]

    def on_before_optimizer_step(self, optimizer):
        self.hooks.append("step")


def batches_of():
    """Six batches of an epoch."""
    inputs, labels = examples()
    return list(zip(inputs.split(4), labels.split(4)))


def fit(module, *callbacks, epochs=1, ckpt_path=None, data=None, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[*callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = DataLoader(TensorDataset(*(data or examples())), batch_size=4)
    torch.manual_seed(3)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def loss_of(model, batch, update):
    return F.cross_entropy(model(batch[0]), batch[1]) / 2  # Lightning divides by accumulate_grad_batches


def loss_of_one(model, batch, update):
    return F.cross_entropy(model(batch[0]), batch[1])


def reference(updates, loss=loss_of_one, kind="sgd", **options):
    net = Net()
    if kind == "adam":
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    losses = algorithm_1(net, optimizer, updates, loss, **{"rho": 0.3, **options})
    return net, losses


SETTINGS = [
    {},
    {"normalization": "none"},
    {"p": math.inf},
    {"direction": "momentum"},
    {"direction": "random"},
    {"ascent_from": 2},
    {"ascent_scope": "micro-batch"},
]


@pytest.mark.parametrize("accumulated", [1, 2], ids=["1 batch", "2 batches"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_weights_are_those_of_algorithm_1(settings, accumulated, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    module, stock = Module(), Module()
    fit(module, SharpnessAwareCallback(0.3, **settings), accumulate_grad_batches=accumulated)
    batches = batches_of()
    updates = [batches[i : i + accumulated] for i in range(0, 6, accumulated)]
    loss = loss_of if accumulated == 2 else loss_of_one
    assert_close(module.net, reference(updates, loss, seed=7, **settings)[0])
    fit(stock, accumulate_grad_batches=accumulated)
    assert_far(module.net, stock.net)


def test_adams_metric_is_that_of_the_modules_adam():
    module = Module(optimizer="adam")
    fit(module, SharpnessAwareCallback(0.3, normalization="adam"))
    updates = [[batch] for batch in batches_of()]
    assert_close(module.net, reference(updates, kind="adam", normalization="adam")[0])


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_only_the_last_gradient_is_clipped(algorithm):
    module = Module()
    fit(module, SharpnessAwareCallback(0.3), gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    updates = [[batch] for batch in batches_of()]
    assert_close(module.net, reference(updates, clip=lambda weights: clip(weights, 0.05))[0])


@pytest.mark.parametrize("settings", [{}, {"direction": "random"}], ids=str)
@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_logs_metrics_and_hooks_count_each_batch_once(accumulated, settings):
    module, stock = Module(), Module()
    trainer = fit(module, SharpnessAwareCallback(0.3, **settings), accumulate_grad_batches=accumulated)
    fit(stock, accumulate_grad_batches=accumulated)
    assert trainer.logged_metrics["examples"] == 24
    assert len(module.scores.value) == len(stock.scores.value) == 24 / 4
    for hook in ("zero_grad", "backward", "gradient", "step"):
        assert module.hooks.count(hook) == stock.hooks.count(hook)


def test_logs_are_of_the_pass_at_w():
    module = Module()
    trainer = fit(module, SharpnessAwareCallback(0.3))
    _, losses = reference([[batch] for batch in batches_of()])
    at_w, at_w_plus_epsilon = zip(*losses)
    assert trainer.logged_metrics["loss"] == pytest.approx(sum(at_w) / 6, rel=1e-6)
    assert module.losses[0::2] == pytest.approx(at_w) and module.losses[1::2] == pytest.approx(
        at_w_plus_epsilon
    )


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_sharpness_logged_is_that_of_the_update(accumulated, scope):
    trainer = fit(
        Module(), SharpnessAwareCallback(0.3, ascent_scope=scope), accumulate_grad_batches=accumulated
    )
    batches = batches_of()
    updates = [batches[i : i + accumulated] for i in range(0, 6, accumulated)]
    loss = loss_of if accumulated == 2 else loss_of_one
    _, losses = reference(updates, loss, ascent_scope=scope)
    expected = sum(losses[-1][1::2]) - sum(losses[-1][0::2])
    assert trainer.logged_metrics["sharpness"] == pytest.approx(expected, rel=1e-6)


def test_the_hooks_of_the_backward_pass_see_the_gradient_of_the_step():
    module = Module()
    fit(module, SharpnessAwareCallback(0.3), limit_train_batches=1)
    before, after = Net(), module.net
    for w, v, gradient in zip(before.parameters(), after.parameters(), module.last):
        torch.testing.assert_close(w - 0.1 * gradient, v, rtol=0, atol=1e-12)


def test_both_passes_draw_the_same_masks_and_batch_normalization_counts_once():
    module = Module(dropout=0.4)
    module.net.norm = nn.BatchNorm1d(8).double()
    fit(module, SharpnessAwareCallback(0.3), accumulate_grad_batches=2)
    masks = [tuple(mask.flatten().tolist()) for mask in module.net.masks]
    for start in (0, 4, 8):
        assert masks[start : start + 2] == masks[start + 2 : start + 4]
    assert len(set(masks)) == 6
    assert module.net.norm.num_batches_tracked == 6


@pytest.mark.parametrize("accumulated", [1, 2])
def test_rho_0_is_stock_lightning_bit_for_bit(accumulated):
    modules = Module(dropout=0.4), Module(dropout=0.4)
    ours = fit(modules[0], SharpnessAwareCallback(0.0), accumulate_grad_batches=accumulated)
    stock = fit(modules[1], accumulate_grad_batches=accumulated)
    assert all(map(torch.equal, modules[0].parameters(), modules[1].parameters()))
    assert ours.logged_metrics == stock.logged_metrics
    assert modules[0].hooks == modules[1].hooks


@pytest.mark.parametrize("settings", [{}, {"direction": "momentum"}, {"direction": "random"}], ids=str)
def test_a_resumed_run_is_the_whole_one_bit_for_bit(settings, tmp_path):
    whole, first, second = Module(), Module(), Module()
    fit(whole, SharpnessAwareCallback(0.3, **settings), epochs=2)
    fit(first, SharpnessAwareCallback(0.3, **settings)).save_checkpoint(tmp_path / "first.ckpt")
    fit(second, SharpnessAwareCallback(0.3, **settings), epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert all(map(torch.equal, whole.parameters(), second.parameters()))


IN_TWO_PROCESSES = [({}, 1), ({}, 3), ({"ascent_scope": "micro-batch"}, 3), ({"direction": "random"}, 3)]


def train_in_one_of_two(rank, count, port):
    names = {"NODE_RANK": 0, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    data, weights = [each[rank::count] for each in examples()], []
    for settings, accumulated in IN_TWO_PROCESSES:
        module = Module()
        options = {"strategy": "ddp", "devices": count, "use_distributed_sampler": False, "data": data}
        options["accumulate_grad_batches"] = accumulated
        trainer = fit(module, SharpnessAwareCallback(0.3, **settings), **options)
        assert trainer.world_size == 2
        weights.append({name: w.tolist() for name, w in module.net.state_dict().items()})
    return weights


def test_two_processes_are_algorithm_1_with_the_batches_of_both():
    both = started(2, train_in_one_of_two)
    assert both[0] == both[1]
    inputs, labels = examples()
    first, second = (list(zip(inputs[rank::2].split(4), labels[rank::2].split(4))) for rank in range(2))

    def loss_of(model, batch, update):
        return F.cross_entropy(model(batch[0]), batch[1]) / len(update)

    for (settings, accumulated), weights in zip(IN_TWO_PROCESSES, both[0]):
        turns = [slice(i, i + accumulated) for i in range(0, 3, accumulated)]
        net, _ = reference([first[turn] + second[turn] for turn in turns], loss_of, **settings)
        for name, w in net.state_dict().items():
            torch.testing.assert_close(torch.tensor(weights[name], dtype=w.dtype), w, rtol=0, atol=1e-12)


class Skipping(Module):
    """Returns no loss for some batches."""

    skipped = (1, 4)

    def training_step(self, batch, number):
        return None if number in self.skipped else super().training_step(batch, number)


@pytest.mark.parametrize("scope", ["update", "micro-batch"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_batch_without_a_loss_is_skipped(accumulated, scope):
    module = Skipping()
    fit(module, SharpnessAwareCallback(0.3, ascent_scope=scope), accumulate_grad_batches=accumulated)
    batches = [None if i in Skipping.skipped else batch for i, batch in enumerate(batches_of())]
    updates = [batches[i : i + accumulated] for i in range(0, 6, accumulated)]
    kept = [[batch for batch in update if batch is not None] for update in updates]
    kept = [update for update in kept if update]
    loss = loss_of if accumulated == 2 else loss_of_one
    assert_close(module.net, reference(kept, loss, ascent_scope=scope)[0])


class Averaged(Module):
    """Remembers its weights at the beginning of each epoch, of which the average is made."""

    def on_train_epoch_start(self):
        weights = [w.detach().clone() for w in self.net.parameters()]
        self.seen = [*getattr(self, "seen", []), weights]


def test_stochastic_weight_averaging_averages_the_weights_of_sharpness_aware_updates():
    averaged, alone = Averaged(), Averaged()
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1, annealing_epochs=1)
    fit(averaged, averaging, SharpnessAwareCallback(0.3), epochs=4)
    fit(alone, SharpnessAwareCallback(0.3), epochs=4)
    for w, *each in zip(averaged.net.parameters(), *alone.seen):
        torch.testing.assert_close(w.detach(), sum(each) / 4, rtol=0, atol=1e-12)


def test_the_epoch_that_averages_batch_normalization_is_made_of_single_passes():
    module = Averaged()
    module.net.norm = nn.BatchNorm1d(8).double()
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1, annealing_epochs=1)
    fit(module, averaging, SharpnessAwareCallback(0.3), epochs=4)
    assert len(module.losses) == 4 * 6 * 2 + 6


def test_a_gradient_scaler_changes_nothing_and_skips_an_update_that_overflows():
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Scaled(MixedPrecision):
        def forward_context(self):
            return torch.enable_grad()

    class Overflowing(Module):
        bad = passes = 0

        def training_step(self, batch, number):
            self.passes += 1
            return super().training_step(batch, number) * (math.inf if self.passes == self.bad else 1.0)

    def run(bad, batches):
        module = Overflowing()
        module.bad, gradients = bad, gradients_of_outputs(module.net)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        precision = Scaled("16-mixed", "cpu", scaler)
        options = {"plugins": [precision], "gradient_clip_val": 0.5, "limit_train_batches": batches}
        fit(module, SharpnessAwareCallback(0.3), **options)
        assert len(gradients) == 2 * batches and min(gradients) > 1
        return module.net

    updates = [[batch] for batch in batches_of()]
    clip = {"clip": lambda weights: nn.utils.clip_grad_norm_(weights, 0.5)}
    assert_close(run(0, 6), reference(updates, **clip)[0])
    for bad in (3, 4):  # the pass at w, the one at w + epsilon
        assert_close(run(bad, 2), reference(updates[:1], **clip)[0])


def test_a_trainer_may_fit_again_and_an_error_leaves_nothing_behind():
    class Failing(Module):
        passes, fails = 0, True

        def training_step(self, batch, number):
            self.passes += 1
            if self.fails and self.passes == 2:
                raise RuntimeError("out of something")
            return super().training_step(batch, number)

    module, callback = Failing(), SharpnessAwareCallback(0.3)
    with pytest.raises(RuntimeError, match="out of something"):
        fit(module, callback)
    assert_close(module.net, Net(), 0.0)
    module.fails = False
    trainer = fit(module, callback)
    assert_close(module.net, reference([[batch] for batch in batches_of()])[0])
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert "log" not in vars(module)


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Twice(Module):
    def configure_optimizers(self):
        return SharpnessAware(super().configure_optimizers(), self, rho=0.1)


class WithoutMomentum(Module):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        (
            Manual,
            {},
            "Manual has automatic_optimization=False, .*: make them in training_step with TwoPasses",
        ),
        (Twice, {}, "the optimizer is SharpnessAware, which is sharpness-aware already"),
        (WithoutMomentum, {"direction": "momentum"}, "SGD keeps no first moment"),
        (Module, {"normalization": "adam"}, "SGD does not keep Adam's second moment"),
        (Module, {"ascent_from": 6}, "ascent_from is 6, but training ends after 6 updates"),
    ],
)
def test_what_cannot_be_is_refused_when_fit_begins(module, settings, message):
    made = module()
    with pytest.raises(ValueError, match=message):
        fit(made, SharpnessAwareCallback(0.3, **settings))
    assert_close(made.net, Net(), 0.0)


def test_bad_values_are_refused_when_the_callback_is_made():
    with pytest.raises(ValueError, match="rho is -1"):
        SharpnessAwareCallback(-1)
    with pytest.raises(ValueError, match="direction is 'up', but it must be one of"):
        SharpnessAwareCallback(0.1, direction="up")


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_keep_gradients_to_themselves_are_refused(kind):
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = type("Own", (kind,), {})
    with pytest.raises(ValueError, match=r"the strategy is Own, which keeps .*: use ddp"):
        SharpnessAwareCallback(0.3).setup(trainer, Module(), "fit")


class TakesItsBatchApart(Module):
    def training_step(self, batch, number):
        labels = batch.pop()
        batch[0] = batch[0] / 2
        return super().training_step((batch[0], labels), number)


class Halves(Module):
    def training_step(self, batch, number):
        return super().training_step((batch[0] / 2, batch[1]), number)


class HalvesInPlace(Module):
    def training_step(self, batch, number):
        batch[0] /= 2
        return super().training_step(batch, number)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_both_passes_get_the_batch_that_training_step_takes_apart(accumulated):
    modules = TakesItsBatchApart(), Halves()
    for module in modules:
        fit(module, SharpnessAwareCallback(rho=0.3), accumulate_grad_batches=accumulated)
    assert_close(modules[0].net, modules[1].net, 0.0)
    with pytest.raises(RuntimeError, match=r"changed an argument of shape .* in place"):
        fit(HalvesInPlace(), SharpnessAwareCallback(rho=0.3))


def test_hooks_of_the_backward_pass_may_log():
    class Logging(Module):
        def on_after_backward(self):
            super().on_after_backward()
            self.log("gradient", self.net.first.weight.grad.norm())

    module = Logging()
    trainer = fit(module, SharpnessAwareCallback(rho=0.3))
    last = module.last[0].norm().float()
    assert trainer.callback_metrics["gradient"] == pytest.approx(last.item(), rel=1e-6)
