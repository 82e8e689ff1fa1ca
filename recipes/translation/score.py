"""Translates a split with the best checkpoint of a run and prints its BLEU.

    python -m recipes.translation.score DATA RUN [--split test]

DATA is a corpus folder of data_prep, RUN a folder of train.sh. Writes the sources, references and hypotheses,
one sentence a line, to RUN/SPLIT.src, RUN/SPLIT.ref and RUN/SPLIT.hyp, and to RUN/SPLIT.json sacrebleu's BLEU
of these and the BLEU of tokens that fairseq-generate prints: two scales, not to be compared with each other.
A translation that is newer than its checkpoint is not made again.

Where the corpus is of tokenized text (it has bpe.codes), sacremoses detokenizes references and translations.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sacrebleu.metrics import BLEU
from sacremoses import MosesDetokenizer
from tqdm import tqdm

from fairseq_asam.files import whole
from recipes.translation.files import read_lines
from recipes.translation.progress import show_failure

PLUGIN = Path(__file__).resolve().parents[2] / "fairseq_asam"


def main() -> None:
    parser = argparse.ArgumentParser(description="Translate a split with the best checkpoint of a run.")
    parser.add_argument("data", type=Path, help="corpus folder of data_prep")
    parser.add_argument("run", type=Path, help="folder of train.sh")
    parser.add_argument("--split", default="test", help="the split to translate (default: test)")
    args = parser.parse_args()
    checkpoint = args.run / "checkpoint_best.pt"
    texts = {"src": args.data / f"{args.split}.de", "ref": args.data / f"{args.split}.en"}
    for file in (checkpoint, *texts.values()):
        if not file.exists():
            sys.exit(f"score.py: '{file}' is missing: prepare the corpus and train on it first.")

    scores = args.run / f"{args.split}.json"
    if not scores.exists() or scores.stat().st_mtime < checkpoint.stat().st_mtime:
        tokenized = (args.data / "bpe.codes").exists()
        pieces = "subword_nmt" if tokenized else "sentencepiece"
        references = read_lines(texts["ref"])
        hypotheses, bleu_of_tokens = translate(
            args.data / "bin", checkpoint, args.split, pieces, len(references)
        )
        if tokenized:
            hypotheses, references = detokenized(hypotheses), detokenized(references)
        with whole(args.run / f"{args.split}.src") as file:
            shutil.copyfile(texts["src"], file)
        for ending, lines in (("ref", references), ("hyp", hypotheses)):
            with whole(args.run / f"{args.split}.{ending}") as file:
                file.write_text("".join(line + "\n" for line in lines), "utf-8")
        bleu = BLEU()
        result = {
            "BLEU": bleu.corpus_score(hypotheses, [references]).score,
            "signature": f"BLEU|{bleu.get_signature()}",
            "BLEU of tokens": bleu_of_tokens,
        }
        with whole(scores) as file:
            file.write_text(json.dumps(result, indent=2) + "\n", "utf-8")

    result = json.loads(scores.read_text("utf-8"))
    print(
        f"{args.run.name}, {args.split}: BLEU {result['BLEU']:.2f} ({result['signature']}); "
        f"of tokens, by fairseq-generate, {result['BLEU of tokens']:.2f}"
    )


def translate(
    binarized: Path, checkpoint: Path, split: str, pieces: str, sentences: int
) -> tuple[list[str], float]:
    """Return the translations of a split with so many sentences, in their order and without the marks of
    `pieces`, and the BLEU that fairseq-generate prints.

    fairseq-generate's messages go to generate.log beside the checkpoint.
    """
    command = ["fairseq-generate", str(binarized), "--user-dir", str(PLUGIN), "--path", str(checkpoint)]
    command += ["--gen-subset", split, "--beam", "5", "--max-tokens", "4096"]
    # Some fairseq versions leave out the last batch if its size isn't a multiple of this number.
    command += ["--required-batch-size-multiple", "1"]
    command += ["--post-process", pieces, "--no-progress-bar"]
    translations: dict[int, str] = {}
    bleu = None
    log_path = checkpoint.with_name("generate.log")
    with (
        open(log_path, "w", encoding="utf-8") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        ) as generation,
        tqdm(
            desc=f"{checkpoint.parent.name}, {split}", total=sentences, unit="sentence", disable=None
        ) as bar,
    ):
        for line in generation.stdout:
            # H-<number of the sentence> <tab> <log-probability> <tab> <translation>
            if line.startswith("H-"):
                number, _, translation = line[2:].rstrip("\n").split("\t", 2)
                translations[int(number)] = translation
                bar.update()
            elif found := re.search(r"^Generate .*BLEU4 = ([\d.]+)", line):
                bleu = float(found[1])
    if generation.returncode != 0:
        show_failure("fairseq-generate", generation.returncode, log_path)
        sys.exit(generation.returncode)
    if sorted(translations) != list(range(sentences)) or bleu is None:
        sys.exit(f"score.py: fairseq-generate translated {len(translations)} of {sentences} sentences.")
    return [translations[number] for number in range(sentences)], bleu


def detokenized(lines: list[str]) -> list[str]:
    """Return lines of English tokens as text."""
    english = MosesDetokenizer(lang="en")
    return [english.detokenize(line.split()) for line in lines]


if __name__ == "__main__":
    main()
