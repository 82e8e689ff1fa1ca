"""Translates a split with the best checkpoint of a run and prints its BLEU.

    python -m recipes.translation.score DATA RUN [--split test]

DATA is a corpus folder of data_prep, RUN a folder of train.py. Writes the sources, references and hypotheses,
one sentence a line, to RUN/SPLIT.src, RUN/SPLIT.ref and RUN/SPLIT.hyp. RUN/SPLIT.json gets sacrebleu's BLEU
and chrF of these, and the BLEU of tokens that fairseq-generate prints: not to be compared with sacrebleu's.
A translation is not made again if its checkpoint is no newer than it, or not there any more, and it is of
the same sentences and references.

Where the corpus is of tokenized text (it has bpe.codes), sacremoses detokenizes references and translations.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sacrebleu.metrics import BLEU, CHRF
from sacremoses import MosesDetokenizer
from tqdm import tqdm

from fairseq_asam.files import write_json
from recipes.reporter import write_text

PLUGIN = Path(__file__).resolve().parents[2] / "fairseq_asam"
LINES_SHOWN_ON_FAILURE = 20
METRICS = {"BLEU": BLEU, "chrF2": CHRF}


def main() -> None:
    parser = argparse.ArgumentParser(description="Translate a split with the best checkpoint of a run.")
    parser.add_argument("data", type=Path, help="corpus folder of data_prep")
    parser.add_argument("run", type=Path, help="folder of train.py")
    parser.add_argument("--split", default="test", help="the split to translate (default: test)")
    args = parser.parse_args()
    checkpoint, scores = args.run / "checkpoint_best.pt", args.run / f"{args.split}.json"
    source, reference = (args.data / f"{args.split}.{language}" for language in languages(args.data))
    tokenized = (args.data / "bpe.codes").exists()
    copies = {ending: args.run / f"{args.split}.{ending}" for ending in ("src", "ref")}
    require(source, reference)
    texts = {"src": read_lines(source), "ref": read_lines(reference)}
    if tokenized:
        texts["ref"] = detokenized(texts["ref"])
    of_other_data = any(file.exists() and read_lines(file) != texts[each] for each, file in copies.items())
    translated = scores.exists() and not is_newer(checkpoint, scores) and not of_other_data
    if not translated:
        require(checkpoint)
    if of_other_data:  # Stopped below, they would pass for those of the new sentences.
        scores.unlink(missing_ok=True)
    for ending, file in copies.items():
        if not translated or not file.exists():
            write_lines(file, texts[ending])
    if not translated:
        written = checkpoint.stat().st_mtime_ns
        pieces, references = "subword_nmt" if tokenized else "sentencepiece", texts["ref"]
        hypotheses, bleu_of_tokens = translate(
            args.data / "bin", checkpoint, args.split, pieces, len(references)
        )
        if tokenized:
            hypotheses = detokenized(hypotheses)
        write_lines(args.run / f"{args.split}.hyp", hypotheses)
        metrics = {name: metric() for name, metric in METRICS.items()}
        result = {
            **{name: each.corpus_score(hypotheses, [references]).score for name, each in metrics.items()},
            "signatures": [f"{name}|{each.get_signature()}" for name, each in metrics.items()],
            "BLEU of tokens": bleu_of_tokens,
        }
        write_json(scores, result)
        os.utime(scores, ns=(written, written))  # older than a checkpoint that came meanwhile

    result = json.loads(scores.read_text("utf-8"))
    print(
        f"{args.run.name}, {args.split}: BLEU {result['BLEU']:.2f}, chrF2 {result['chrF2']:.2f} "
        f"({', '.join(result['signatures'])}); BLEU of tokens, by fairseq-generate, "
        f"{result['BLEU of tokens']:.2f}"
    )


def require(*files: Path) -> None:
    """Raise SystemExit if one of *files* is missing."""
    for file in files:
        if not file.exists():
            sys.exit(f"score.py: '{file}' is missing: prepare the corpus and train on it first.")


def languages(data: Path) -> tuple[str, str]:
    """Return the codes of the source and the target language of a corpus folder, from what bin/ holds.

    Raises:
        SystemExit: There is no corpus.
    """
    for file in data.glob("bin/test.*-*.*.idx"):
        source, target = file.name.split(".")[1].split("-")
        return source, target
    sys.exit(f"score.py: '{data}' holds no corpus: prepare it and train on it first.")


def translate(
    binarized: Path, checkpoint: Path, split: str, pieces: str, sentences: int
) -> tuple[list[str], float]:
    """Translate a split by fairseq-generate, whose messages go to SPLIT.log beside the checkpoint.

    Args:
        binarized: Folder that fairseq-preprocess wrote.
        checkpoint: The model.
        split: What to translate.
        pieces: Whose marks to take out of the translations: `sentencepiece` or `subword_nmt`.
        sentences: Their number in the split.

    Returns:
        The translations in the order of the split, and the BLEU that fairseq-generate prints.
    """
    command = [sys.executable, "-m", "fairseq_cli.generate", str(binarized), "--path", str(checkpoint)]
    command += ["--user-dir", str(PLUGIN), "--gen-subset", split, "--beam", "5", "--max-tokens", "4096"]
    # Some fairseq versions drop a last batch that is no multiple of this number (default: 8).
    command += ["--required-batch-size-multiple", "1"]
    command += ["--post-process", pieces, "--no-progress-bar"]
    translations: dict[int, str] = {}
    bleu = None
    log_path = checkpoint.with_name(f"{split}.log")
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
        print(*read_lines(log_path)[-LINES_SHOWN_ON_FAILURE:], sep="\n", file=sys.stderr)
        sys.exit(f"fairseq-generate failed with status {generation.returncode}; see '{log_path}'.")
    if sorted(translations) != list(range(sentences)) or bleu is None:
        sys.exit(f"score.py: fairseq-generate translated {len(translations)} of {sentences} sentences.")
    return [translations[number] for number in range(sentences)], bleu


def is_newer(file: Path, other: Path) -> bool:
    """Return whether *file* exists and was written after *other*."""
    return file.exists() and file.stat().st_mtime > other.stat().st_mtime


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their ends; only a newline ends a line."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\n") for line in file]


def references_of(runs: Sequence[Path], split: str) -> list[str]:
    """Return the references of *split* that score.py wrote to the folders of *runs*.

    Raises:
        SystemExit: They are not the same in all.
    """
    first, *others = (read_lines(run / f"{split}.ref") for run in runs)
    for run, references in zip(runs[1:], others):
        if references != first:
            sys.exit(f"'{run / split}.ref' is not '{runs[0] / split}.ref': compare runs of one corpus.")
    return first


def write_lines(path: Path, lines: list[str]) -> None:
    """Write *lines*, each ended by a newline."""
    write_text(path, "".join(line + "\n" for line in lines))


def detokenized(lines: list[str]) -> list[str]:
    """Return lines of English tokens as text."""
    english = MosesDetokenizer(lang="en")
    return [english.detokenize(line.split()) for line in lines]


if __name__ == "__main__":
    main()
