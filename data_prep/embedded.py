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
from data_prep.dictionary import clean_pairs
from data_prep.package import Unavailable, dictionary_from, fetched_dictionary
from data_prep.pairs import Pair, Rules

STAND_IN_PAIRS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.embedded", description=__doc__.split("\n")[0])
    corpus.add_arguments(parser, vocabulary=4000, held_out=1000)
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

    def pairs(rules: Rules) -> tuple[list[Pair], corpus.Statistics]:
        try:
            lines = dictionary_from(arguments.package) if arguments.package else fetched_dictionary()
        except Unavailable as reason:
            note = f"The generated corpus stands in for the dictionary, which can't be had ({reason})."
            print(note, file=sys.stderr)
            return generated.pairs(STAND_IN_PAIRS, arguments.seed), {"corpus": "generated", "note": note}
        return clean_pairs(tqdm(lines, desc="reading the dictionary", unit="line", disable=None), rules), {
            "corpus": "embedded"
        }

    corpus.prepare(arguments, pairs)


if __name__ == "__main__":
    corpus.run(main)
