"""Translates a split with the best checkpoint of a run and prints its BLEU.

    python recipes/translation/score.py DATA RUN [--split test]

DATA is a corpus folder of data_prep, RUN a folder of train.sh. Writes the sources, references and hypotheses,
one sentence a line, to RUN/SPLIT.src, RUN/SPLIT.ref and RUN/SPLIT.hyp. A translation that is newer than its
checkpoint is not made again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from files import read_lines, whole
from progress import show_failure
from sacrebleu.metrics import BLEU
from tqdm import tqdm

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

    references = read_lines(texts["ref"])
    hypotheses = args.run / f"{args.split}.hyp"
    if not hypotheses.exists() or hypotheses.stat().st_mtime < checkpoint.stat().st_mtime:
        translations = translate(args.data / "bin", checkpoint, args.split, len(references))
        for ending, text in texts.items():
            with whole(args.run / f"{args.split}.{ending}") as file:
                shutil.copyfile(text, file)
        with whole(hypotheses) as file:
            file.write_text("".join(line + "\n" for line in translations), "utf-8")

    bleu = BLEU()
    score = bleu.corpus_score(read_lines(hypotheses), [references])
    print(f"{args.run.name}, {args.split}: {score.format(signature=str(bleu.get_signature()))}")


def translate(binarized: Path, checkpoint: Path, split: str, sentences: int) -> list[str]:
    """Return the detokenized translations of a split with so many sentences, in their order.

    fairseq-generate's messages go to generate.log beside the checkpoint.
    """
    command = ["fairseq-generate", str(binarized), "--user-dir", str(PLUGIN), "--path", str(checkpoint)]
    command += ["--gen-subset", split, "--beam", "5", "--max-tokens", "4096"]
    # Some fairseq versions leave out the last batch if its size isn't a multiple of this number.
    command += ["--required-batch-size-multiple", "1"]
    command += ["--post-process", "sentencepiece", "--no-progress-bar"]
    translations: dict[int, str] = {}
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
    if generation.returncode != 0:
        show_failure("fairseq-generate", generation.returncode, log_path)
        sys.exit(generation.returncode)
    if sorted(translations) != list(range(sentences)):
        sys.exit(f"score.py: fairseq-generate translated {len(translations)} of {sentences} sentences.")
    return [translations[number] for number in range(sentences)]


if __name__ == "__main__":
    main()
