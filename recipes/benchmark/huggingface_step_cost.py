"""Measures what an update of HuggingFace's Trainer costs, with and without sharpness awareness.

    python -m recipes.benchmark.huggingface_step_cost [--layers N] [--width N] [--batch-size N] [--length N]
        [--rounds N] [--updates N] [--device cpu|cuda] [--threads N] [--out FILE]

A T5 is made from its configuration, by default of the shape of google/t5-efficient-tiny, and trained on random
sentences: nothing is downloaded. The Trainers keep their defaults (AdamW, dropout, clipping). They take turns,
in another order each round, so that other work of the machine slows down all of them. The time of an update
is all that passes between the ends of two.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

from fairseq_asam.files import write_json
from fairseq_asam.integrations.huggingface import SharpnessAwareTrainer
from recipes.benchmark.trainers import add_machine, machine, synchronize, use_machine
from recipes.options import at_least_1

STOCK = "Trainer"
SAM, ASAM = {"rho": 0.05, "normalization": "none"}, {"rho": 0.5}
MOMENTUM = {"direction": "momentum"}
# The options of each Trainer. The others are compared to the stock one.
TRAINERS = {
    STOCK: None,
    "SAM": SAM,
    "ASAM": ASAM,
    "SAM, momentum": {**SAM, **MOMENTUM},
    "ASAM, momentum": {**ASAM, **MOMENTUM},
}
HEAD = 64  # width of an attention head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def add(option: str, default: int, text: str) -> None:
        text = f"{text} (default: {default})"
        parser.add_argument(option, type=at_least_1, default=default, metavar="N", help=text)

    add("--layers", 4, "layers of the encoder, and of the decoder")
    add("--width", 256, f"width of the model, a multiple of {HEAD}")
    add("--batch-size", 8, "pairs of sentences in a batch")
    add("--length", 64, "tokens in a sentence")
    add("--rounds", 15, "rounds to time, after one that warms up")
    add("--updates", 3, "updates of a round to time, after one that warms up")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    add_machine(parser)
    args = parser.parse_args()
    use_machine(parser, args)
    if args.width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, not {args.width}")

    sizes = {"d_model": args.width, "d_ff": 4 * args.width, "num_heads": args.width // HEAD, "d_kv": HEAD}
    config = T5Config(num_layers=args.layers, decoder_start_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config)
    setting = {name: value for name, value in vars(args).items() if name != "out"}
    setting.update(weights=model.num_parameters(), torch=torch.__version__)
    print(f"{machine(args.device, args.threads)}, torch {torch.__version__}, {setting['weights']} weights\n")
    rows = compared(measure(model, args))
    print("| | seconds per update | ratio to the stock Trainer | quartiles |\n|:--|--:|--:|--:|")
    for row in rows:
        print("| {name} | {seconds:.3f} | {ratio:.3f} | {low:.3f} to {high:.3f} |".format(**row))
    if args.out:
        write_json(args.out, {**setting, "trainers": rows})


def measure(model: T5ForConditionalGeneration, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return for each of TRAINERS, which train copies of *model*, the seconds of an update in each round."""
    updates = args.updates + 1  # the first warms up
    pairs = torch.randint(2, model.config.vocab_size, (updates * args.batch_size, 2, args.length))
    data = [{"input_ids": source, "labels": target} for source, target in pairs]
    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": updates, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
        options.update(use_cpu=args.device == "cpu", per_device_train_batch_size=args.batch_size)
        trainers = {}
        for name, settings in TRAINERS.items():
            kind = Trainer if settings is None else SharpnessAwareTrainer
            trainers[name] = kind(
                copy.deepcopy(model), Arguments(folder, **options), None, data, **settings or {}
            )
            trainers[name].remove_callback(PrinterCallback)
        for _ in tqdm(range(args.rounds + 1), unit="round", disable=None):
            for name in order.sample(list(trainers), len(trainers)):
                seconds[name].append(seconds_of_update(trainers[name]))
    return {name: times[1:] for name, times in seconds.items()}


class Clock(TrainerCallback):
    """Notes when each update ends."""

    def __init__(self, cuda: bool):
        self.cuda, self.ends = cuda, []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        synchronize(self.cuda)
        self.ends.append(time.perf_counter())


def seconds_of_update(trainer: Trainer) -> float:
    """Train with *trainer*, and return the mean seconds of its updates after the first."""
    clock = Clock(not trainer.args.use_cpu)
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1)


def compared(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row for each Trainer, with its ratio to the stock one: the median over rounds, and quartiles."""
    rows = []
    for name, times in seconds.items():
        ratios = torch.tensor([one / stock for one, stock in zip(times, seconds[STOCK])], dtype=torch.double)
        low, ratio, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)).tolist()
        row = {"name": name, "seconds": statistics.median(times), "ratio": ratio, "low": low, "high": high}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
