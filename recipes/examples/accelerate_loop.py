"""Trains a classifier of handwritten digits, sharpness-aware, in a loop of accelerate, on several processes.

    torchrun --nproc_per_node 2 -m recipes.examples.accelerate_loop [--epochs N] [--rho RHO]

The digits are scikit-learn's: nothing is downloaded. Each update has one epsilon for its four micro-batches,
two of each process. Prints loss and sharpness of each epoch, and the accuracy in the end.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from fairseq_asam import Perturbation
from fairseq_asam.integrations.accelerate import AccumulatingTwoPasses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rho", type=float, default=0.5)
    arguments = parser.parse_args()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(1)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(labels))
    train, valid = (DataLoader(part, 16, shuffle=True) for part in random_split(data, [0.8, 0.2]))
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, train, valid = accelerator.prepare(model, optimizer, train, valid)
    perturbation = Perturbation(model.named_parameters(), arguments.rho)
    two_passes = AccumulatingTwoPasses(accelerator, model, perturbation)

    def forward_and_backward(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        return loss

    for epoch in range(1, arguments.epochs + 1):
        for inputs, labels in train:
            with accelerator.accumulate(model):
                loss = two_passes(forward_and_backward, inputs, labels)
                optimizer.step()
                optimizer.zero_grad()
        sharpness = two_passes.sharpness / accelerator.gradient_accumulation_steps
        accelerator.print(f"epoch {epoch}: loss {loss:.4f}, sharpness {sharpness:.4f}")
    with torch.no_grad():
        right = [accelerator.gather_for_metrics(model(x).argmax(1) == labels) for x, labels in valid]
    accelerator.print(f"accuracy {torch.cat(right).float().mean():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
