"""The code in the README of ``fairseq_asam/sharpness`` runs, block after block, and trains."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import fairseq_asam
from tests.commands import ROOT

BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "fairseq_asam/sharpness/README.md").read_text("utf-8"), re.DOTALL
)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 2)])

    def forward(self, inputs):
        first, second = self.layers
        return second(first(inputs).tanh())


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_each_block_trains_after_the_first(number, process_group):
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(4)]
    variables = {
        "torch": torch,
        "fully_shard": fully_shard,
        "model": model,
        "optimizer": optimizer,
        "batches": batches,
        "inputs": batches[0][0],
        "targets": batches[0][1],
        "loss_of": F.cross_entropy,
        "update": 0,
        **{name: getattr(fairseq_asam, name) for name in fairseq_asam.__all__},
    }
    perturbation = fairseq_asam.Perturbation(model.named_parameters(), rho=0.5)
    variables["two_passes"] = fairseq_asam.TwoPasses(perturbation, [model])
    is_sharded = "fully_shard" in BLOCKS[number]
    for block in [BLOCKS[number], BLOCKS[0]] if is_sharded else [BLOCKS[0], BLOCKS[number]]:
        exec(block, variables)
    variables["optimizer"].step()
    for weight, before in zip(model.parameters(), Network().parameters()):
        weight = weight.full_tensor() if is_sharded else weight
        assert weight.isfinite().all() and not torch.equal(weight, before)
