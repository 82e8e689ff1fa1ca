"""The code of fairseq_asam/integrations/README.md trains as a plain loop of Algorithm 1 does."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairseq_asam import Perturbation, TwoPasses
from tests.algorithm1 import Net, algorithm_1, assert_close, examples
from tests.test_readmes import code_of

pytest.importorskip("transformers")
pytest.importorskip("lightning")
import lightning
from accelerate import Accelerator
from transformers import TrainingArguments

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
SAM = {"rho": 0.05, "normalization": "none"}


def batches() -> list:
    return list(zip(*(each.split(4) for each in examples(16))))


def loss_of(model, batch, update):
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def plain_loop(updates: list, loss=loss_of, **options) -> Net:
    model = Net()
    algorithm_1(model, sgd(model), updates, loss, **SAM, **options)
    return model


def block(word: str) -> str:
    """The code of the page that has *word*."""
    (found,) = (code for code in code_of("fairseq_asam/integrations/README.md") if word in code)
    return found


class Classifier(Net):
    """A model for HuggingFace's Trainer."""

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(super().forward(x), labels)}


def test_the_code_for_huggingface(tmp_path):
    options = {"max_steps": 4, "per_device_train_batch_size": 16, "learning_rate": 0.05, "optim": "sgd"}
    options |= {"save_strategy": "no", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    names = {
        "model": Classifier(),
        "arguments": TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, **options
        ),
        "data": [{"x": x, "labels": label} for x, label in zip(*examples(16))],
    }
    exec(block("SharpnessAwareTrainer"), names)
    assert_close(names["model"], plain_loop([[examples(16)]] * 4))


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, number):
        return loss_of(self.net, batch, None)

    def configure_optimizers(self):
        return sgd(self)


def fit(trainer: lightning.Trainer, module: Module) -> None:
    trainer.fit_loop.max_epochs = 1
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_code_for_lightning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes its logs here
    names, module = {"lightning": lightning}, Module()
    exec(block("SharpnessAwareCallback"), names)
    fit(names["trainer"], module)
    assert_close(module.net, plain_loop([[batch] for batch in batches()]))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_code_for_lightnings_manual_optimization(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block("def training_step"), names)

    class ByHand(Module):
        training_step = names["training_step"]

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.two_passes = TwoPasses(Perturbation(self.net.named_parameters(), **SAM), [self])

        def forward_and_backward(self, *batch):
            loss = loss_of(self.net, batch, None)
            self.manual_backward(loss)
            return loss

    module = ByHand()
    fit(lightning.Trainer(), module)
    assert_close(module.net, plain_loop([[batch] for batch in batches()]))


def test_the_code_for_accelerate():
    model = Net()
    names = {
        "accelerator": Accelerator(cpu=True, gradient_accumulation_steps=2),
        "Perturbation": Perturbation,
        "model": model,
        "optimizer": sgd(model),
        "loader": batches(),
        "loss_of": F.cross_entropy,
    }
    exec(block("AccumulatingTwoPasses"), names)

    def half(model, batch, update):
        return loss_of(model, batch, update) / 2

    def clip(weights):
        nn.utils.clip_grad_norm_(weights, 1.0)

    parts = batches()
    assert_close(model, plain_loop([parts[:2], parts[2:]], half, clip=clip))
