"""Prepares the embedded corpus, German-English, from the Ding dictionary in Debian's package trans-de-en.

    python -m data_prep.embedded DEST [--package FILE] [--vocab-size N] [--held-out N] [--seed N]

DEST gets {train,valid,test}.{de,en}, phrases.{de,en}, sentencepiece.model and .vocab, embeddings.{de,en} to
start from, bin/ for fairseq, and statistics.json.
Where the package can't be had, the generated corpus stands in, and the output says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from data_prep import corpus, generated
from data_prep.cleaning import Pair, Rules
from data_prep.debian import Unavailable
from data_prep.dictionary import clean_pairs
from data_prep.held_out import Splits
from data_prep.package import dictionary_from, fetched_dictionary
from data_prep.segmentation import SIDES, SPLITS
from data_prep.split import one_word_neighbours, split, without_rare_phrases

STAND_IN_PAIRS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.embedded", description=__doc__.split("\n")[0])
    corpus.add_arguments_with_embeddings(parser, vocabulary=4000, held_out=1000)
    parser.add_argument(
        "--package",
        type=Path,
        metavar="FILE",
        help="a local trans-de-en .deb, or a dictionary file, plain or .gz (default: the installed package, "
        "or else apt-get downloads it)",
    )
    parser.add_argument(
        "--train-on-phrases",
        action="store_true",
        help="train on the phrases as well (default: they serve the embeddings only)",
    )
    arguments = parser.parse_args()

    def source(rules: Rules) -> tuple[Splits, corpus.Statistics]:
        try:
            lines = dictionary_from(arguments.package) if arguments.package else fetched_dictionary()
        except Unavailable as reason:
            note = f"The generated corpus stands in for the dictionary, which can't be had ({reason})."
            print(note, file=sys.stderr)
            pairs = generated.pairs(STAND_IN_PAIRS, arguments.seed)
            about = {"corpus": "generated", "note": note}
        else:
            progress = tqdm(lines, desc="reading the dictionary", unit="line", disable=None)
            pairs, about = clean_pairs(progress, rules), {"corpus": "embedded"}
        splits = split(pairs, rules, arguments.held_out, arguments.seed)
        training = without_rare_phrases(splits["train"], rules)
        sentences = list(filter(Pair.is_sentence, training))
        splits["phrases"] = [pair for pair in training if not pair.is_sentence()]
        splits["train"] = training if arguments.train_on_phrases else sentences
        about["training sentences"] = len(sentences)
        about["held-out sentences one word from a training sentence"] = {
            name: {
                side: one_word_neighbours(
                    (getattr(pair, side) for pair in splits[name]),
                    (getattr(pair, side) for pair in sentences),
                )
                for side in SIDES.values()
            }
            for name in SPLITS[1:]
        }
        return splits, about

    corpus.prepare(arguments, source)


if __name__ == "__main__":
    corpus.run(main)
