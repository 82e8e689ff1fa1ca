"""The parts of a corpus folder that are made from its text: the sentencepiece model and bin/."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from data_prep import PreparationError
from fairseq_asam.files import whole

SPLITS = ("train", "valid", "test")
#: The codes of the source and the target language, which the names of files end in.
Languages = tuple[str, str]
MODEL, VOCABULARY = "sentencepiece.model", "sentencepiece.vocab"
BINARIZED = "bin"
#: sentencepiece silently skips longer lines, by default from 4,192 bytes on.
LONGEST_LINE_BYTES = 2**30


def text_files(languages: Languages) -> tuple[str, ...]:
    """Return the names of the files of text."""
    return tuple(f"{name}.{language}" for name in SPLITS for language in languages)


def train_sentencepiece(folder: Path, languages: Languages, vocabulary: int, normalization: str) -> None:
    """Train a unigram model on the training text of both languages, with every letter that stands in it.

    sentencepiece's rule of `normalization` may make another letter of it first.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain.from_iterable(
                zip(*(lines(folder / f"train.{language}") for language in languages))
            ),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocabulary,
            character_coverage=1.0,
            hard_vocab_limit=False,
            normalization_rule_name=normalization,
            max_sentence_length=LONGEST_LINE_BYTES,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise PreparationError(f"--vocab-size {vocabulary}: sentencepiece says: {error}.") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = ((processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size()))
    write_whole(folder / VOCABULARY, (f"{piece}\t{score:g}\n" for piece, score in pieces))
    write_whole(folder / MODEL, model.getvalue())


def binarize(folder: Path, languages: Languages, workers: int, scratch: Path) -> dict[str, int]:
    """Have fairseq-preprocess make `scratch`/bin, with one dictionary, of the text of `folder`, segmented.

    Returns:
        The number of pieces in each text.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    pieces: dict[str, int] = {}
    for name in tqdm(text_files(languages), desc="segmenting", unit="file", disable=None):
        segmented = [" ".join(line) for line in processor.encode(list(lines(folder / name)), out_type=str)]
        pieces[name] = sum(len(line.split()) for line in segmented)
        write_whole(scratch / name, (line + "\n" for line in segmented))
    preprocess(scratch, languages, scratch / BINARIZED, workers, "--joined-dictionary")
    return pieces


def preprocess(segmented: Path, languages: Languages, destination: Path, workers: int, *flags: str) -> None:
    """Have fairseq-preprocess make `destination` of the segmented text of all splits; `flags` are its own."""
    command = [sys.executable, "-m", "fairseq_cli.preprocess"]
    for side, language in zip(("source", "target"), languages):
        command += [f"--{side}-lang", language]
    for name in SPLITS:
        command += [f"--{name}pref", str(segmented / name)]
    command += ["--workers", str(workers), "--destdir", str(destination), *flags]
    print("binarizing with fairseq-preprocess", flush=True)
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise PreparationError(f"fairseq-preprocess failed:\n{outcome.stderr[-2000:]}")


def lines(file: Path) -> Iterable[str]:
    """Yield the lines of `file` without their ends."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield line.rstrip("\n")


def write_whole(file: Path, content: Iterable[str] | bytes) -> None:
    """Write `file` at once or not at all."""
    with whole(file) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            with temporary.open("w", encoding="utf-8") as output:
                output.writelines(content)
