"""Weights in shards are refused, on every process, in one sentence."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fairseq_asam import Perturbation, SharpnessAware


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_flat(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def tensor_parallel(model):
    return parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [fsdp1, fsdp1_flat, fsdp2, tensor_parallel])
def test_weights_in_shards_are_refused(process_group, shard):
    model = shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"weight|flat_param.* is in shards .*: use DistributedDataParallel"):
        Perturbation(model.named_parameters(), rho=0.1)
    with pytest.raises(ValueError, match="is in shards"):
        SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1)


@pytest.mark.filterwarnings("ignore")
def test_weights_put_into_shards_later_are_refused_before_they_move(process_group):
    model = nn.Linear(4, 4)
    perturbation = Perturbation(model.named_parameters(), rho=0.1)
    wrapped = fsdp1(model)
    wrapped(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match="is in shards"), perturbation:
        pass
