"""The corpus folder: raw text, a joint sentencepiece model, embeddings, fairseq's binarized form, statistics.

A folder is built beside its destination, as `.NAME.partial`, and renamed when it is whole. What an
interrupted run finished there, the next run with the same settings takes up.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from tqdm import tqdm

from data_prep.embeddings import aligned_counts, embeddings
from data_prep.pairs import Pair, Rules
from data_prep.split import one_word_neighbours, split, without_rare_phrases

SPLITS = ("train", "valid", "test")
SIDES = {"de": "german", "en": "english"}
TEXTS = tuple(f"{name}.{language}" for name in SPLITS for language in SIDES)
PHRASES = tuple(f"phrases.{language}" for language in SIDES)
EMBEDDINGS = tuple(f"embeddings.{language}" for language in SIDES)
MODEL, VOCABULARY = "sentencepiece.model", "sentencepiece.vocab"
BINARIZED = "bin"
STATISTICS = "statistics.json"
SMALLEST_VOCABULARY = 100

Statistics = dict[str, Any]
Source = Callable[[Rules], "tuple[list[Pair], Statistics]"]


class PreparationError(Exception):
    """What keeps a corpus from being prepared, in one sentence for the user."""


def add_arguments(parser: argparse.ArgumentParser, vocabulary: int, held_out: int) -> None:
    """The arguments that every corpus has, with the defaults that suit this one."""
    parser.add_argument("destination", metavar="DEST", type=Path, help="folder to make")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=vocabulary,
        metavar="N",
        help="sentencepiece pieces, shared by both languages; a corpus too small for N gets fewer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--embed-dim",
        type=int,
        default=128,
        metavar="N",
        help="numbers in an embedding, for fairseq's --encoder-embed-path and --decoder-embed-path "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=held_out,
        metavar="N",
        help="sentences in the validation set, and as many in the test set (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="which sentences are held out (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes for fairseq-preprocess (default: all %(default)s cores)",
    )


def run(main: Callable[[], None]) -> None:
    """Calls `main`; what stops it becomes one sentence on stderr and an exit status that isn't 0."""
    try:
        main()
    except PreparationError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to go on.")


def prepare(arguments: argparse.Namespace, source: Source) -> None:
    """Makes the corpus folder, or what is missing of it, and prints the table of counts.

    `source` gives the clean pairs and what statistics.json is to say about them; it is called only
    where the text isn't there yet. All `arguments` but the workers tell one corpus from another.

    Raises PreparationError where an argument is out of range, the destination can't be written or holds
    something else, or the pairs are too few.
    """
    if arguments.vocab_size < SMALLEST_VOCABULARY:
        raise PreparationError(
            f"--vocab-size {arguments.vocab_size}: must be at least {SMALLEST_VOCABULARY}, "
            "for letters and marks alone take most of that."
        )
    for name in ("held_out", "embed_dim", "workers"):
        if getattr(arguments, name) < 1:
            option = "--" + name.replace("_", "-")
            raise PreparationError(f"{option} {getattr(arguments, name)}: must be at least 1.")
    destination = arguments.destination
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("destination", "workers")
    }
    try:
        if _is_whole(destination, settings):
            print(f"{destination} is complete: nothing to do.")
        else:
            _build(destination, settings, arguments.workers, source)
    except OSError as error:
        raise PreparationError(
            f"{destination}: cannot be written ({error.strerror}: {error.filename}); "
            "choose a folder that you may write to, with 200 MB free."
        ) from None
    _print_summary(_read_statistics(destination))


def _is_whole(folder: Path, settings: Statistics) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    statistics = _read_statistics(folder)
    if not statistics:
        raise PreparationError(f"{folder}: exists and is no corpus made here; name a new folder.")
    for name, value in settings.items():
        if statistics["settings"].get(name) != value:
            raise PreparationError(
                f"{folder}: was prepared with {name} {statistics['settings'].get(name)}, not {value}; "
                "name another folder, or remove this one."
            )
    parts = (*TEXTS, *PHRASES, MODEL, VOCABULARY, *EMBEDDINGS, BINARIZED)
    return all((folder / part).exists() for part in parts)


def _read_statistics(folder: Path) -> Statistics:
    try:
        return json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _build(destination: Path, settings: Statistics, workers: int, source: Source) -> None:
    """Makes the parts that are missing, in a folder beside `destination` that takes its name at the end."""
    partial = destination.with_name(f".{destination.name}.partial")
    if destination.exists():  # empty, or a corpus of these settings that lost a part
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(destination, partial)
    elif _read_statistics(partial).get("settings") != settings:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def missing(*names: str) -> bool:
        return not all((partial / name).exists() for name in names)

    if missing(*TEXTS, *PHRASES, STATISTICS):
        _write_text(partial, settings, source)
    if missing(MODEL, VOCABULARY):
        _train_sentencepiece(partial, settings["vocab_size"])
    if missing(*EMBEDDINGS):
        _make_embeddings(partial, settings["embed_dim"])
    if missing(BINARIZED):
        _binarize(partial, workers)
    os.replace(partial, destination)


def _write_text(folder: Path, settings: Statistics, source: Source) -> None:
    rules = Rules()
    pairs, about = source(rules)
    held_out = settings["held_out"]
    splits = split(pairs, rules, held_out, settings["seed"])
    if min(len(splits["test"]), len(splits["valid"])) < held_out or not splits["train"]:
        sentences = sum(map(Pair.is_sentence, pairs))
        raise PreparationError(
            f"--held-out {held_out}: two such sets and a training set can't be had from "
            f"{sentences} sentences; choose fewer."
        )
    training = without_rare_phrases(splits["train"], rules)
    training_sentences = list(filter(Pair.is_sentence, training))
    splits["phrases"] = [pair for pair in training if not pair.is_sentence()]
    splits["train"] = training if settings["train_on_phrases"] else training_sentences
    for name, pairs in splits.items():
        for language, side in SIDES.items():
            _write_whole(folder / f"{name}.{language}", (getattr(pair, side) + "\n" for pair in pairs))
    statistics = {
        **about,
        "settings": settings,
        "rules": rules.table,
        "pairs": {name: len(pairs) for name, pairs in splits.items()},
        "training sentences": len(training_sentences),
        "held-out sentences one word from a training sentence": {
            name: {
                side: one_word_neighbours(
                    (getattr(pair, side) for pair in splits[name]),
                    (getattr(pair, side) for pair in training_sentences),
                )
                for side in SIDES.values()
            }
            for name in SPLITS[1:]
        },
    }
    _write_whole(folder / STATISTICS, [json.dumps(statistics, indent=2, ensure_ascii=False) + "\n"])


def _train_sentencepiece(folder: Path, vocabulary: int) -> None:
    """A unigram model of the training sentences of both languages, with every letter that stands in them."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([side for pair in _training_sentences(folder) for side in pair]),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocabulary,
            character_coverage=1.0,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise PreparationError(f"--vocab-size {vocabulary}: sentencepiece says: {error}.") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = ((processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size()))
    _write_whole(folder / VOCABULARY, (f"{piece}\t{score:g}\n" for piece, score in pieces))
    _write_whole(folder / MODEL, model.getvalue())


def _make_embeddings(folder: Path, dimension: int) -> None:
    """Embeddings from the training sentences and the phrases, in the text format that fairseq reads."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    pairs = [*_training_sentences(folder), *zip(*(_lines(folder / name) for name in PHRASES))]
    segmented = [processor.encode(list(side)) for side in zip(*pairs)]
    counts = aligned_counts(*segmented, processor.get_piece_size())
    for name, vectors in zip(EMBEDDINGS, embeddings(counts, dimension)):
        rows = (
            " ".join([processor.id_to_piece(piece), *(f"{value:.4f}" for value in vector)]) + "\n"
            for piece, vector in enumerate(vectors)
        )
        _write_whole(folder / name, [f"{len(vectors)} {dimension}\n", *rows])


def _binarize(folder: Path, workers: int) -> None:
    """Segments the text and hands it to fairseq-preprocess, with one dictionary for both languages."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _segment_and_preprocess(folder, workers, Path(scratch))


def _segment_and_preprocess(folder: Path, workers: int, scratch: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL))
    pieces: dict[str, int] = {}
    for name in tqdm(TEXTS, desc="segmenting", unit="file", disable=None):
        segmented = [" ".join(line) for line in processor.encode(list(_lines(folder / name)), out_type=str)]
        pieces[name] = sum(line.count(" ") + 1 for line in segmented)
        _write_whole(scratch / name, (line + "\n" for line in segmented))
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--source-lang", "de", "--target-lang", "en"]
    for name in SPLITS:
        command += [f"--{name}pref", str(scratch / name)]
    command += ["--joined-dictionary", "--workers", str(workers), "--destdir", str(scratch / BINARIZED)]
    print("binarizing with fairseq-preprocess", flush=True)
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        raise PreparationError(f"fairseq-preprocess failed:\n{outcome.stderr[-2000:]}")
    statistics = {**_read_statistics(folder), "pieces": pieces}
    _write_whole(folder / STATISTICS, [json.dumps(statistics, indent=2, ensure_ascii=False) + "\n"])
    os.replace(scratch / BINARIZED, folder / BINARIZED)


def _training_sentences(folder: Path) -> list[tuple[str, str]]:
    pairs = zip(_lines(folder / "train.de"), _lines(folder / "train.en"))
    return [(german, english) for german, english in pairs if Pair(german, english, 0).is_sentence()]


def _lines(file: Path) -> Iterable[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield line.rstrip("\n")


def _write_whole(file: Path, content: Iterable[str] | bytes) -> None:
    """Writes under a temporary name first, so that `file` is never seen half written."""
    temporary = file.with_name(file.name + ".tmp")
    if isinstance(content, bytes):
        temporary.write_bytes(content)
    else:
        with temporary.open("w", encoding="utf-8") as output:
            output.writelines(content)
    os.replace(temporary, file)


def _print_summary(statistics: Statistics) -> None:
    width = max(len(row["rule"]) for row in statistics["rules"])
    print(f"{'rule':{width}}  {'kept':>8}  {'dropped':>8}")
    for row in statistics["rules"]:
        print(f"{row['rule']:{width}}  {row['kept']:>8}  {row['dropped']:>8}")
    print(", ".join(f"{name}: {count} pairs" for name, count in statistics["pairs"].items()))
    if "note" in statistics:
        print(statistics["note"])
