"""The loss of fairseq checkpoints, and what cannot be loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fairseq_asam.measuring.fairseq_checkpoints import DatasetLoss, load
from tests.commands import checkpoint, run_module, trained
from tests.measuring.edited import edited

LANGUAGE_MODEL = [
    *("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "40"),
    *("--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
]


@pytest.mark.parametrize("optimizer", ["adam", "asam"])
def test_the_loss_at_w_is_the_one_that_fairseq_validates(request, optimizer, data):
    path = request.getfixturevalue(optimizer)
    loss = DatasetLoss(load(path, data, cpu=True), "valid")
    assert sum(map(len, loss.batches)) == len(loss.dataset) and loss.skipped == 0
    terms = [(term.item(), tokens) for term, tokens in loss()]
    bits = sum(term for term, _ in terms) / sum(tokens for _, tokens in terms) / math.log(2)
    state = checkpoint(Path(path).parent)["extra_state"]
    assert bits == pytest.approx(state["val_loss"], abs=1e-3)  # fairseq rounds


def test_a_checkpoint_from_before_an_option_was_added_can_be_measured(asam, data, tmp_path):
    state = checkpoint(Path(asam).parent)
    del state["cfg"]["optimizer"]["ascent_direction"]
    torch.save(state, tmp_path / "earlier.pt")
    loss = DatasetLoss(load(str(tmp_path / "earlier.pt"), data, cpu=True), "valid")
    assert sum(tokens for _, tokens in loss()) > 0


def test_the_loss_of_a_training_by_sentences_is_that_of_a_token_too(adam, data, tmp_path):
    state = checkpoint(Path(adam).parent)
    state["cfg"]["criterion"]["sentence_avg"] = True
    torch.save(state, tmp_path / "by_sentences.pt")
    for_tokens, for_sentences = (
        [(term.item(), size) for term, size in DatasetLoss(load(str(path), data, cpu=True), "valid")()]
        for path in (adam, tmp_path / "by_sentences.pt")
    )
    assert for_tokens == for_sentences


def test_a_cached_data_set_is_read(adam, corpus, data, tmp_path):
    """fairseq reads the batches of one ahead (--dataset-impl cached)."""
    dictionaries = [f"--{side}dict={data}/dict.{end}.txt" for side, end in (("src", "de"), ("tgt", "en"))]
    losses = []
    for kind in ("mmap", "cached"):
        folder = tmp_path / kind
        pair = ("--source-lang=de", "--target-lang=en", f"--validpref={corpus}/valid", *dictionaries)
        preprocess = ("fairseq_cli.preprocess", *pair, f"--dataset-impl={kind}", f"--destdir={folder}")
        run_module(*preprocess).check_returncode()
        loss = DatasetLoss(load(adam, str(folder), cpu=True), "valid")
        losses.append([(term.item(), size) for term, size in loss()])
    assert losses[0] == losses[1]


def test_random_batches_are_the_same_for_the_same_seed(adam, data):
    loaded = load(adam, data, cpu=True)
    chosen = [DatasetLoss(loaded, "train", 300, 3, seed).batches for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def rename_german(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.rename(folder / file.name.replace(".de", ".fr").replace("de-en", "fr-en"))


def add_words(folder: Path) -> None:
    for language in ("de", "en"):
        with open(folder / f"dict.{language}.txt", "a") as file:
            file.write("newword 1\n")


def test_what_does_not_fit_is_refused_in_a_sentence(adam, asam, corpus, data, tmp_path):
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    monolingual = tmp_path / "monolingual"
    prefixes = [f"--{split}pref={corpus}/{split}.en" for split in ("train", "valid")]
    preprocess = ("fairseq_cli.preprocess", "--only-source", *prefixes, f"--destdir={monolingual}")
    run_module(*preprocess).check_returncode()
    language_model = trained(tmp_path / "lm", monolingual, "--optimizer", "adam", *LANGUAGE_MODEL)
    assert load(language_model, str(monolingual), cpu=True).task.source_dictionary is not None

    french = edited(data, tmp_path / "french", rename_german)
    without = edited(data, tmp_path / "without", lambda f: [d.unlink() for d in f.glob("dict.*")])
    larger = edited(data, tmp_path / "larger", add_words)
    for path, folder, message in (
        (tmp_path / "none.pt", data, "the checkpoint '.*none.pt' does not exist"),
        (adam, tmp_path / "none", "the data set '.*none' does not exist"),
        (text, data, "is not a fairseq checkpoint"),
        (tmp_path / "other.pt", data, "is not a fairseq checkpoint"),
        (
            adam,
            without,
            "of the task 'translation', .*without' is not prepared for: 'dict.de.txt' is missing",
        ),
        (asam, without, "needs dict.de.txt and dict.en.txt, but '.*without' has no dictionary"),
        (asam, french, "translates from de to en .* but '.*' has dict.en.txt and dict.fr.txt"),
        (adam, larger, "does not fit the dictionaries in '.*larger'.*size mismatch"),
        (adam, monolingual, "of the task 'translation', .*monolingual' is not prepared for: Could not infer"),
        (language_model, data, "'language_modeling', which '.*' is not prepared for: 'dict.txt' is missing"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            load(str(path), str(folder), cpu=True)
        assert "\n" not in str(refusal.value)
    (tmp_path / "json").mkdir()
    for folder, reason in (("nowhere", "nowhere"), ("json", "json")):
        with pytest.raises(ValueError, match=f"--user-dir '.*{folder}' cannot be imported .*{reason}"):
            load(adam, data, user_dir=str(tmp_path / folder), cpu=True)
    with pytest.raises(ValueError, match="has no split 'dev'"):
        DatasetLoss(load(adam, data, cpu=True), "dev")
    for options, message in (
        ({"batches": 0}, "the number of batches is 0"),
        ({"max_tokens": -1}, "the size of a batch is -1"),
        ({"max_tokens": 3}, "the size of a batch is 3 tokens, too few"),
    ):
        with pytest.raises(ValueError, match=message):
            DatasetLoss(load(adam, data, cpu=True), "valid", **options)
