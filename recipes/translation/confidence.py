"""How sure trained models are of the next token, and how often they are right.

    python -m recipes.translation.confidence DATA OUT RUN RUN... [--split valid]

explains where loss and BLEU disagree. DATA is a corpus folder of data_prep, a RUN a folder of train.py, of
which the best checkpoint counts. The models see the reference up to each token (teacher forcing). Means over
the tokens of the split: the loss of training and the negative log-likelihood, in bits; accuracy, the share of
tokens to which the model gives the highest probability; confidence, that highest probability; and the entropy
of the distribution, in bits. A model whose confidence is above its accuracy is too sure. BLEU stands beside
them where score.py has scored the split. Writes OUT/confidence.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fairseq_asam.files import write_json
from fairseq_asam.measuring.fairseq_checkpoints import DatasetLoss, load
from recipes.reporter import markdown_table, shown, write_text

#: The figures of a model and the number of decimals that the table shows.
FIGURES = {
    **{"loss": 3, "negative log-likelihood": 3, "accuracy": 3, "confidence": 3},
    **{"confidence - accuracy": 3, "entropy": 3, "BLEU": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure how sure models are of the next token, and how often they are right."
    )
    parser.add_argument("data", type=Path, help="corpus folder of data_prep")
    parser.add_argument("out", type=Path, help="folder for confidence.json and confidence.md")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of train.py")
    parser.add_argument("--split", default="valid", help="the split to look at (default: valid)")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "checkpoint_best.pt").exists():
            sys.exit(f"confidence.py: '{run / 'checkpoint_best.pt'}' is missing: train the run first.")
    try:
        models = [
            {"run": run.name, **figures_of(run, args.data, args.split)}
            for run in tqdm(args.runs, unit="run", disable=None)
        ]
    except ValueError as error:
        sys.exit(f"confidence.py: {error}.")
    results = {"split": args.split, "models": models}
    table = as_markdown(results)
    write_json(args.out / "confidence.json", results)
    write_text(args.out / "confidence.md", table)
    print(table, end="")


def figures_of(run: Path, data: Path, split: str) -> dict[str, float | None]:
    """Return the figures of the best checkpoint of *run*; BLEU is None where there is no translation.

    Raises:
        ValueError: The checkpoint does not fit the corpus, or there is no such split.
    """
    checkpoint = load(str(run / "checkpoint_best.pt"), str(data / "bin"))
    batches = DatasetLoss(checkpoint, split)
    sums: dict[str, float] = {}
    with torch.no_grad():
        for sample in batches.samples():
            output = checkpoint.model(**sample["net_input"])
            log_probabilities = checkpoint.model.get_normalized_probs(output, log_probs=True)
            of_batch = sums_over_tokens(log_probabilities, sample["target"], checkpoint.criterion.padding_idx)
            loss, _ = checkpoint.criterion.compute_loss(checkpoint.model, output, sample)
            of_batch["loss"] = loss.item() / math.log(2)
            sums = {name: sums.get(name, 0.0) + value for name, value in of_batch.items()}
    tokens = sums.pop("tokens")
    means = {name: value / tokens for name, value in sums.items()}
    scores = run / f"{split}.json"
    return {
        "tokens": int(tokens),
        **means,
        "confidence - accuracy": means["confidence"] - means["accuracy"],
        "BLEU": json.loads(scores.read_text("utf-8"))["BLEU"] if scores.exists() else None,
    }


def as_markdown(results: dict) -> str:
    """Return the table and what its figures are of."""
    models = results["models"]
    rows = [[m["run"], *(shown(m[name], digits=d) for name, d in FIGURES.items())] for m in models]
    return (
        f"Split `{results['split']}`, {models[0]['tokens']} target tokens, each given the reference before "
        "it. Loss, negative log-likelihood and entropy in bits per token.\n\n"
        + markdown_table(["", *FIGURES], rows)
    )


def sums_over_tokens(log_probabilities: Tensor, target: Tensor, padding: int) -> dict[str, float]:
    """Return the figures of a batch, summed over its tokens, and the number of these.

    Args:
        log_probabilities: Natural logarithms, sentences x positions x words.
        target: The right words, sentences x positions.
        padding: The word that stands where a sentence has no more.
    """
    of_tokens = target != padding
    lprobs, target = log_probabilities[of_tokens].double(), target[of_tokens]
    best, predicted = lprobs.max(1)
    figures = {
        "negative log-likelihood": -lprobs.gather(1, target[:, None]) / math.log(2),
        "accuracy": predicted == target,
        "confidence": best.exp(),
        "entropy": -(lprobs.exp() * lprobs).sum(1) / math.log(2),
    }
    return {"tokens": float(len(target)), **{name: figure.sum().item() for name, figure in figures.items()}}


if __name__ == "__main__":
    main()
