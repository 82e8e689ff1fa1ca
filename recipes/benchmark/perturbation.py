"""Measures perturb and restore beside other implementations, on the weights of transformer_iwslt_de_en.

    python -m recipes.benchmark.perturbation [--davda54 FILE] [--samsung FILE] [--threads N]
                                             [--device cpu|cuda] [--rounds N] [--out FILE]

The files are `sam.py` of github.com/davda54/sam and `asam.py` of github.com/SamsungLabs/ASAM; PyPI's
pytorch-optimizer takes part if it is installed. All make an adaptive perturbation of 39.5 million weights and
take it back; they take turns, in another order each round, so that other work of the machine slows down all
of them. The step of a base optimizer is no part of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from recipes.benchmark.trainers import add_machine, use_machine  # before fairseq, to quieten it

# isort: split
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerModel, transformer_iwslt_de_en
from torch import nn
from tqdm import tqdm

from fairseq_asam import Perturbation
from fairseq_asam.files import write_json
from recipes.options import at_least_1

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
    parser.add_argument("--rounds", type=at_least_1, default=20, help="rounds to time (default: 20)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    add_machine(parser)
    args = parser.parse_args()
    use_machine(parser, args)
    for file in filter(None, (args.davda54, args.samsung)):
        if not file.is_file():
            parser.error(f"{file}: no such file")

    model = transformer().to(args.device)
    torch.manual_seed(0)
    gradients = [torch.randn_like(parameter) * 1e-3 for parameter in model.parameters()]
    seconds = measure(contestants(model, args), model, gradients, args.device, args.rounds)
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
        write_json(args.out, {**setting, "figures": figures})


def transformer() -> nn.Module:
    """Return a Transformer of the paper's Section 5.3, with fresh weights."""
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


def contestants(model: nn.Module, args: Namespace) -> dict[str, Callable[[], None]]:
    """Return functions that perturb the weights of *model*, which have gradients, and restore them."""
    perturbation = Perturbation(model.named_parameters(), rho=RHO)

    def ours() -> None:
        with perturbation:
            pass

    functions = {"fairseq_asam": ours}
    options = {"rho": RHO, "adaptive": True, "lr": 0.0}
    if args.davda54:
        davda54 = module_of(args.davda54).SAM(model.parameters(), NoStep, **options)
        functions["davda54/sam"] = lambda: (davda54.first_step(), davda54.second_step())
    if args.samsung:
        samsung = module_of(args.samsung).ASAM(NoStep(model.parameters(), lr=0.0), model, rho=RHO)
        functions["SamsungLabs/ASAM"] = lambda: (samsung.ascent_step(), samsung.descent_step())
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import SAM

        kozistr = SAM(model.parameters(), NoStep, **options)
        functions["pytorch-optimizer"] = lambda: (kozistr.first_step(), kozistr.second_step())
    return functions


def module_of(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def measure(
    functions: dict[str, Callable[[], None]],
    model: nn.Module,
    gradients: list[torch.Tensor],
    device: str,
    rounds: int,
) -> dict[str, list[float]]:
    """Return the seconds of each function in each round. One round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    weights = [parameter.data for parameter in model.parameters()]
    order = random.Random(0)
    for _ in tqdm(range(rounds + 1), unit="round", disable=None):
        for name in order.sample(list(functions), len(functions)):
            # Give all functions the same memory: some of it is a sixth slower. Some functions change the
            # gradients, and one leaves the weights in other memory.
            for parameter, weight, gradient in zip(model.parameters(), weights, gradients):
                parameter.data, parameter.grad = weight, gradient.clone()
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            functions[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return {name: times[1:] for name, times in seconds.items()}


if __name__ == "__main__":
    main()
