"""Trains a small language model, whose weights are in shards over processes, with AdamW, SAM or ASAM.

    torchrun --nproc_per_node 2 -m recipes.language_model.train --optimizer asam [--data FILE ...] [--out RUN]

The model learns to predict the bytes of text files, by default of generated sentences. RUN gets checkpoints,
and result.json at the end. The same command goes on from the last checkpoint, with any number of processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from fairseq_asam import Perturbation, TwoPasses
from fairseq_asam.files import write_json
from recipes.language_model.command_line import REGIONS, check, options, text_of
from recipes.language_model.transformer import LanguageModel

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
except ImportError:
    sys.exit(f"torch {torch.__version__} is too old for weights in shards: install torch 2.6 or newer.")

# Options that must not change when a run goes on.
SHAPE = ("layers", "width", "context")


def in_shards(model: nn.Module, mesh: DeviceMesh, precision: str) -> LanguageModel:
    """Put the weights into float32 shards. With bf16, a pass gathers them rounded to bfloat16; epsilon and
    the step of the optimizer stay in float32."""
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16" else {}
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes))
    return model


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per byte, of *windows* (batch x (context + 1))."""
    return F.cross_entropy(model(windows[:, :-1]).float(), windows[:, 1:].flatten())


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    two_passes: TwoPasses | None,
    micro_batches: list[Tensor],
    clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make one update together with the other processes. Return the loss at w and the sharpness of this
    process's *micro_batches*, and the norm of the gradient."""
    loss = torch.zeros((), device=micro_batches[0].device)
    for number, windows in enumerate(micro_batches, start=1):
        is_last = number == len(micro_batches)

        def forward_and_backward(windows: Tensor = windows, is_last: bool = is_last) -> Tensor:
            # Until the last micro-batch, each process keeps whole weights and adds up whole gradients. The
            # last one must reduce the gradients, since epsilon and the step need those of all processes. It
            # must also free the whole weights, since the step changes only the shards.
            model.set_requires_gradient_sync(is_last)
            model.set_reshard_after_backward(is_last)
            part = loss_of(model, windows) / len(micro_batches)
            part.backward()
            return part.detach()

        loss += forward_and_backward() if two_passes is None else two_passes.at_w(forward_and_backward)
    if two_passes is not None:
        two_passes.at_w_plus_epsilon()  # one epsilon for all micro-batches
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)  # a DTensor: the norm over all shards
    optimizer.step()
    optimizer.zero_grad()
    sharpness = torch.zeros_like(loss) if two_passes is None else two_passes.sharpness
    return loss, sharpness, norm.full_tensor()


@torch.no_grad()
def validation_loss(model: nn.Module, windows: Tensor) -> float:
    """Return the mean loss over *windows*. Each process computes its share."""
    model.eval()
    share = windows.tensor_split(dist.get_world_size())[dist.get_rank()]
    total = loss_of(model, share) * len(share)
    model.reshard()  # without backward(), nothing else frees the whole weights
    model.train()
    dist.all_reduce(total)
    return total.item() / len(windows)


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict[str, Any]:
    """Return what this process saves: its shards of weights and optimizer state, and the generator."""
    weights, optimizer_state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": optimizer_state, "generator": generator.get_state()}


def save(out: Path, state: dict[str, Any], result: dict[str, Any]) -> None:
    """Write the checkpoint `step-N`, whole or not at all, and then delete the one before."""
    partial = out / "partial"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # a run may have been killed while it saved
        partial.mkdir(parents=True)
    dist.barrier()
    dcp.save(state, checkpoint_id=partial)
    if dist.get_rank() == 0:
        write_json(partial / "result.json", result)
        earlier = list(out.glob("step-*"))
        partial.rename(out / f"step-{len(result['updates'])}")
        for folder in earlier:
            shutil.rmtree(folder)
    dist.barrier()


def load(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """Load the last checkpoint in *out*, if there is one. Return the records of its updates."""
    folder = max(out.glob("step-*"), key=lambda path: int(path.name[5:]), default=None)
    if folder is None:
        return []
    result = json.loads((folder / "result.json").read_text())
    for name in SHAPE:
        mine, other = getattr(args, name), result["options"][name]
        if mine != other:
            raise ValueError(f"{folder} has --{name} {other}, not {mine}: choose another --out")
    state = state_of(model, optimizer, generator)
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.api.CheckpointException:
        raise ValueError(f"{folder} is damaged: delete it to train anew, or choose another --out") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    generator.set_state(state["generator"])
    return result["updates"]


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__)
    args = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc_per_node N")
    processes, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    out = Path(args.out or f"runs/language_model/{args.optimizer}")
    try:
        text_bytes = text_of(args.data)
        check(args, processes, len(text_bytes))
        mesh = init_device_mesh(args.device, (processes,))
        torch.manual_seed(args.seed)  # all processes draw the same weights, and each keeps its shards
        model = LanguageModel(args.layers, args.width, args.context, args.dropout).to(args.device)
        in_shards(model, mesh, args.precision)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        two_passes = None
        if args.optimizer != "adam":
            normalization, default = REGIONS[args.optimizer]
            args.rho = default if args.rho is None else args.rho
            perturbation = Perturbation(model.named_parameters(), args.rho, normalization=normalization)
            two_passes = TwoPasses(perturbation, [model])
        generator = torch.Generator().manual_seed(args.seed)  # all processes draw the same batches
        updates = load(out, model, optimizer, generator, args)
    except ValueError as error:
        parser.error(str(error))
    result = {
        "options": vars(args),
        "processes": processes,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "updates": updates,
    }
    text = torch.frombuffer(bytearray(text_bytes), dtype=torch.uint8).long()
    training, held_out = text.split([len(text) - len(text) // 10, len(text) // 10])
    held_out = held_out.unfold(0, args.context + 1, args.context + 1)[:64].to(args.device)
    steps = range(len(updates) + 1, args.updates + 1)
    bar = tqdm(steps, initial=len(updates), total=args.updates, disable=None if rank == 0 else True)
    for step in bar:
        starts = torch.randint(len(training) - args.context, (args.batch_size,), generator=generator)
        batch = training[starts[:, None] + torch.arange(args.context + 1)]
        share = batch.chunk(processes)[rank].to(args.device)
        # Each update and process draws other dropout masks.
        torch.manual_seed(int(torch.randint(2**40, (), generator=generator)) + rank)
        loss, sharpness, norm = update(
            model, optimizer, two_passes, share.chunk(args.accumulate), args.clip_norm
        )
        means = torch.stack([loss, sharpness])
        dist.all_reduce(means)
        numbers = [*(means / processes).tolist(), norm.item()]
        if not all(map(math.isfinite, numbers)):
            sys.exit(f"update {step} has a loss, sharpness and gradient norm of {numbers}: try a lower --lr")
        updates.append(dict(zip(("loss", "sharpness", "gradient_norm"), numbers)))
        bar.set_postfix(loss=f"{numbers[0]:.4f}", sharpness=f"{numbers[1]:.4f}")
        if step % args.save_every == 0 or step == args.updates:
            updates[-1]["validation_loss"] = validation_loss(model, held_out)
            save(out, state_of(model, optimizer, generator), result)
            if rank == 0:
                numbers = ", ".join(f"{name} {value:.4f}" for name, value in updates[-1].items())
                tqdm.write(f"update {step}: {numbers}")
    if rank == 0:
        write_json(out / "result.json", result)
        tqdm.write(f"{len(updates)} updates of {result['weights']} weights: {out}/result.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
