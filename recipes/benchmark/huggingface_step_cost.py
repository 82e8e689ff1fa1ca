"""Measures what an update of HuggingFace's Trainer costs, with and without sharpness awareness.

    python -m recipes.benchmark.huggingface_step_cost [--batch-size N] [--length N] [--rounds N] [--updates N]
        [--device cpu|cuda] [--threads N] [--out FILE]

A T5 of the shape of google/t5-efficient-tiny is made from its configuration and trained on random sentences:
nothing is downloaded. All else is the Trainer's default, such as AdamW and clipping. An update lasts from the
end of the one before to its own end: seconds of the processor or, on a GPU, of the clock. The Trainers take
turns, in another order each round, so that other work of the machine slows down all of them.
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
import transformers
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from fairseq_asam.files import write_json
from fairseq_asam.integrations.huggingface import SharpnessAwareTrainer
from recipes.benchmark.trainers import add_machine, machine, synchronize, use_machine
from recipes.options import at_least_1

# The options of each Trainer; the stock one has none.
TRAINERS: dict[str, dict[str, Any]] = {
    "stock": {},
    "SAM": {"rho": 0.05, "normalization": "none"},
    "ASAM": {"rho": 0.5},
    "SAM, momentum": {"rho": 0.05, "normalization": "none", "direction": "momentum"},
    "ASAM, momentum": {"rho": 0.5, "direction": "momentum"},
}
SIZES = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_heads": 4, "num_layers": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option, default, text in (
        ("--batch-size", 8, "pairs of sentences in a batch"),
        ("--length", 64, "tokens in a sentence"),
        ("--rounds", 15, "rounds to time, after one that warms up"),
        ("--updates", 3, "updates of a round to time, after one that warms up"),
    ):
        text = f"{text} (default: {default})"
        parser.add_argument(option, type=at_least_1, default=default, metavar="N", help=text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures there too, as JSON")
    add_machine(parser)
    args = parser.parse_args()
    use_machine(parser, args)

    model = T5ForConditionalGeneration(T5Config(**SIZES, decoder_start_token_id=0))
    setting = {name: value for name, value in vars(args).items() if name != "out"}
    setting |= {"device": machine(args.device, args.threads), "weights": model.num_parameters()}
    setting |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print("{device}, torch {torch}, transformers {transformers}, {weights} weights\n".format(**setting))
    rows = compared(measure(model, args))
    print("| Trainer | seconds per update | ratio to stock | quartiles |\n|:--|--:|--:|--:|")
    for row in rows:
        print("| {trainer} | {seconds:.3f} | {ratio:.3f} | {low:.3f} to {high:.3f} |".format(**row))
    if args.out:
        write_json(args.out, {**setting, "trainers": rows})


def measure(model: T5ForConditionalGeneration, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the mean seconds of an update in each round, by the name of the Trainer."""
    transformers.logging.set_verbosity_warning()
    count = (1 + args.updates) * args.batch_size
    pairs = torch.randint(2, model.config.vocab_size, (count, 2, args.length))
    data = [{"input_ids": source, "labels": target} for source, target in pairs]
    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    clock, order = Clock(args.device == "cuda"), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": 1 + args.updates, "per_device_train_batch_size": args.batch_size}
        options |= {"use_cpu": args.device == "cpu", "disable_tqdm": True}
        training = TrainingArguments(folder, save_strategy="no", report_to=[], **options)
        trainers = {}
        for name, options in TRAINERS.items():
            kind = SharpnessAwareTrainer if options else Trainer
            trainers[name] = kind(copy.deepcopy(model), training, None, data, callbacks=[clock], **options)
            trainers[name].remove_callback(transformers.PrinterCallback)
        for _ in tqdm(range(1 + args.rounds), unit="round", disable=None):
            for name in order.sample(list(trainers), len(trainers)):
                trainers[name].train()
                seconds[name].append((clock.ends[-1] - clock.ends[0]) / args.updates)
    return {name: times[1:] for name, times in seconds.items()}


class Clock(TrainerCallback):
    """Notes when each update of a training ends."""

    def __init__(self, cuda: bool):
        self.cuda = cuda

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        synchronize(self.cuda)
        self.ends.append(time.perf_counter() if self.cuda else time.process_time())


def compared(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row for each Trainer: its ratio to stock is the median over rounds, with the quartiles."""
    rows = []
    for name, times in seconds.items():
        ratios = torch.tensor(times, dtype=torch.double) / torch.tensor(seconds["stock"], dtype=torch.double)
        low, ratio, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.double)).tolist()
        rows.append(
            {"trainer": name, "seconds": statistics.median(times), "ratio": ratio, "low": low, "high": high}
        )
    return rows


if __name__ == "__main__":
    main()
