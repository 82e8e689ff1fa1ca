"""Trains a classifier of handwritten digits, sharpness-aware, with Lightning's automatic optimization.

    python -m recipes.examples.lightning_classifier [--epochs N] [--rho RHO]

The digits are scikit-learn's: nothing is downloaded. Prints what the module logged in the last epoch.
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
import torchmetrics
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from fairseq_asam.integrations.lightning import SharpnessAwareCallback


class Classifier(lightning.LightningModule):
    """An ordinary module, which knows nothing of SAM."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
        self.train_accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.valid_accuracy = self.train_accuracy.clone()

    def training_step(self, batch, number):
        outputs = self.net(batch[0])
        self.train_accuracy(outputs, batch[1])
        self.log("train_accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(outputs, batch[1])

    def validation_step(self, batch, number):
        self.valid_accuracy(self.net(batch[0]), batch[1])
        self.log("valid_accuracy", self.valid_accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rho", type=float, default=0.5)
    arguments = parser.parse_args()
    lightning.seed_everything(1)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    train, valid = (DataLoader(part, batch_size=32) for part in random_split(data, [0.8, 0.2]))
    options = {"max_epochs": arguments.epochs, "logger": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(callbacks=[SharpnessAwareCallback(rho=arguments.rho)], **options)
    trainer.fit(Classifier(), train, valid)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
