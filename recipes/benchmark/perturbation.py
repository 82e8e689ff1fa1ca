"""Measures perturb and restore beside other implementations, on the weights of transformer_iwslt_de_en.

    python recipes/benchmark/perturbation.py [--davda54 FILE] [--samsung FILE] [--threads N]
                                             [--device cpu|cuda] [--rounds N] [--out FILE]

The files are `sam.py` of github.com/davda54/sam and `asam.py` of github.com/SamsungLabs/ASAM; PyPI's
pytorch-optimizer takes part if it is installed. All make an adaptive perturbation of 39.5 million weights and
take it back; they take turns, in another order each round, so that whatever else the machine does slows down
all of them. The step of a base optimizer is no part of it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel, transformer_iwslt_de_en
from torch import nn
from tqdm import tqdm

from fairseq_asam import Perturbation

# Sizes of the German and the English dictionary of IWSLT'14 as fairseq prepares it.
VOCABULARIES = (8848, 6632)
RHO = 0.2


class NoStep(torch.optim.SGD):
    """A base optimizer that leaves the weights alone."""

    def step(self, closure=None):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--davda54", type=Path, metavar="FILE", help="sam.py of davda54/sam")
    parser.add_argument("--samsung", type=Path, metavar="FILE", help="asam.py of SamsungLabs/ASAM")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--rounds", type=int, default=20, help="default: 20")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    args = parser.parse_args()
    for option in ("threads", "rounds"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1, not {getattr(args, option)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    for file in filter(None, (args.davda54, args.samsung)):
        if not file.is_file():
            parser.error(f"{file}: no such file")

    torch.set_num_threads(args.threads)
    model = transformer().to(args.device)
    torch.manual_seed(0)
    gradients = [torch.randn_like(parameter) * 1e-3 for parameter in model.parameters()]
    seconds = measure(contestants(model, args), gradients, args.device, args.rounds)
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    peers = [value for name, value in milliseconds.items() if name != "fairseq_asam"]
    count = sum(parameter.numel() for parameter in model.parameters())
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads"
    print(f"{count} weights in {len(gradients)} tensors, {device}, torch {torch.__version__}\n")
    print("| | median ms | minimum ms | ratio to the fastest other |\n|:--|--:|--:|--:|")
    figures = []
    for name, median in milliseconds.items():
        ratio = median / min(peers) if peers else None
        minimum = 1e3 * min(seconds[name])
        print(f"| {name} | {median:.1f} | {minimum:.1f} | {'' if ratio is None else f'{ratio:.2f}'} |")
        figures.append({"name": name, "median_ms": median, "minimum_ms": minimum, "ratio": ratio})
    if args.out:
        setting = {"weights": count, "device": device, "rounds": args.rounds, "torch": torch.__version__}
        args.out.write_text(json.dumps({**setting, "figures": figures}, indent=2) + "\n")


def transformer() -> nn.Module:
    """A Transformer of the paper's Section 5.3, with fresh weights."""
    dictionaries = []
    for size in VOCABULARIES:
        dictionary = Dictionary()
        for number in range(size - len(dictionary)):
            dictionary.add_symbol(str(number))
        dictionaries.append(dictionary)
    options = Namespace(share_decoder_input_output_embed=True)
    transformer_iwslt_de_en(options)
    task = Namespace(source_dictionary=dictionaries[0], target_dictionary=dictionaries[1])
    return TransformerModel.build_model(options, task)


def contestants(model: nn.Module, args: Namespace) -> dict[str, tuple[nn.Module, Callable[[], None]]]:
    """Models like *model*, and functions that perturb their weights and take it back, given that they have
    gradients. Each has a model of its own, as some leave the weights in new memory."""
    options = {"rho": RHO, "adaptive": True, "lr": 0.0}

    def ours(model: nn.Module) -> Callable[[], None]:
        perturbation = Perturbation(model.named_parameters(), rho=RHO)

        def both_ways() -> None:
            with perturbation:
                pass

        return both_ways

    def davda54(model: nn.Module) -> Callable[[], None]:
        sam = module_of(args.davda54).SAM(model.parameters(), NoStep, **options)
        return lambda: (sam.first_step(), sam.second_step())

    def samsung(model: nn.Module) -> Callable[[], None]:
        asam = module_of(args.samsung).ASAM(NoStep(model.parameters(), lr=0.0), model, rho=RHO)
        return lambda: (asam.ascent_step(), asam.descent_step())

    def kozistr(model: nn.Module) -> Callable[[], None]:
        from pytorch_optimizer import SAM

        sam = SAM(model.parameters(), NoStep, **options)
        return lambda: (sam.first_step(), sam.second_step())

    makers = {"fairseq_asam": ours}
    if args.davda54:
        makers["davda54/sam"] = davda54
    if args.samsung:
        makers["SamsungLabs/ASAM"] = samsung
    if importlib.util.find_spec("pytorch_optimizer"):
        makers["pytorch-optimizer"] = kozistr
    models = {name: copy.deepcopy(model) for name in makers}
    return {name: (models[name], make(models[name])) for name, make in makers.items()}


def module_of(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def measure(
    contestants: dict[str, tuple[nn.Module, Callable[[], None]]],
    gradients: list[torch.Tensor],
    device: str,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; one round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = random.Random(0)
    for _ in tqdm(range(rounds + 1), unit="round", disable=None):
        # none should always find the caches and the free memory as one of the others left them
        for name in order.sample(list(contestants), len(contestants)):
            model, function = contestants[name]
            # some of them change the gradients
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter.grad = gradient.clone()
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {name: times[1:] for name, times in seconds.items()}


if __name__ == "__main__":
    main()
