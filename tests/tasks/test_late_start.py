"""``--ascent-from``: plain updates first, sharpness-aware ones from then on."""

from __future__ import annotations

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from fairseq.data.iterators import StreamingEpochBatchIterator
from fairseq.tasks.translation import TranslationTask
from torch.utils.data import IterableDataset

from fairseq_asam.tasks.trainer import count_updates
from tests.commands import PLUGIN, assert_same_state, checkpoint, recipe
from tests.training import configuration, trainer_and_batches

SHARE = ["--optimizer", "asam", "--ascent-from", "0.5", "--max-epoch", "3"]


@pytest.fixture
def train(fairseq, corpus, tmp_path):
    """Run fairseq-train into a folder of the test's own, with a checkpoint every 4 updates."""

    def run(name: str, *flags: str):
        flags = ("--max-tokens", "400", "--dropout", "0.2", "--save-interval-updates", "4", *flags)
        result = fairseq("train", *recipe(corpus / "bin", tmp_path / name, *flags), *PLUGIN)
        assert result.status == 0, result.output[-3000:]
        return result.output

    return run


@pytest.mark.parametrize(
    "own",
    [
        pytest.param([], id="both passes", marks=pytest.mark.slow),
        pytest.param(["--ascent-interval", "3"], id="an interval"),
    ],
)
def test_before_it_is_adam_and_after_it_asam_resumed_from_adam(train, tmp_path, own):
    asam = ["--optimizer", "asam", *own]
    train("adam", "--optimizer", "adam", "--max-update", "8")
    output = train("late", *asam, "--ascent-from", "8", "--max-update", "16", "--log-interval", "1")
    assert_same_state(checkpoint(tmp_path / "adam"), checkpoint(tmp_path / "late", "checkpoint_1_8.pt"))
    lines = [json.loads(line) for line in re.findall(r"\| train_inner \| (\{.*\})", output)]
    measured = [int(line["num_updates"]) for line in lines if "sharpness" in line]
    # An interval counts from the first update of all, and the first that it sees has nothing to reuse.
    assert measured == ([9, 10, 13, 16] if own else list(range(9, 17)))

    train("adam", *asam, "--max-update", "16")
    late = checkpoint(tmp_path / "late")
    assert_same_state(checkpoint(tmp_path / "adam"), late)
    train("share", *asam, "--ascent-from", "0.5", "--max-update", "16")
    assert_same_state(checkpoint(tmp_path / "share"), late)
    for updates in (4, 12):
        resumed = tmp_path / f"from-{updates}"
        resumed.mkdir()
        shutil.copy(tmp_path / "late" / f"checkpoint_1_{updates}.pt", resumed / "checkpoint_last.pt")
        train(resumed.name, *asam, "--ascent-from", "8", "--max-update", "16")
        assert_same_state(checkpoint(resumed), late)


def test_a_share_is_of_the_updates_that_fairseq_makes(train, tmp_path):
    """Of epochs, with accumulation on a schedule; the last update of an epoch has fewer micro-batches."""
    flags = ["--optimizer", "sam", "--max-epoch", "3", "--update-freq", "3,2"]
    output = train("run", *flags, "--ascent-from", "0.7", "--log-interval", "1")
    lines = [json.loads(line) for line in re.findall(r"\| train_inner \| (\{.*\})", output)]
    made = checkpoint(tmp_path / "run")["optimizer_history"][-1]["num_updates"]
    measured = [int(line["num_updates"]) for line in lines if "sharpness" in line]
    assert measured == list(range(round(0.7 * made) + 1, made + 1))


@pytest.mark.parametrize(
    "reset, epochs, start, first",
    [
        # Numbers begin at 0, and two of four epochs are left.
        ("--reset-optimizer", 4, "0.5", lambda epoch: epoch),
        # Numbers go on, and two epochs are left.
        ("--reset-dataloader", 2, "0.75", lambda epoch: 3 * epoch),
    ],
)
def test_a_start_after_a_part_of_a_checkpoint_was_reset(train, tmp_path, reset, epochs, start, first):
    train("adam", "--optimizer", "adam", "--max-epoch", "2")
    of_epoch = checkpoint(tmp_path / "adam")["optimizer_history"][-1]["num_updates"] // 2
    flags = ["--restore-file", str(tmp_path / "adam" / "checkpoint_last.pt"), reset]
    flags += ["--max-epoch", str(epochs)]
    output = train("late", "--optimizer", "asam", "--ascent-from", start, *flags, "--log-interval", "1")
    lines = [json.loads(line) for line in re.findall(r"\| train_inner \| (\{.*\})", output)]
    updates = [int(line["num_updates"]) for line in lines]
    measured = [int(line["num_updates"]) for line in lines if "sharpness" in line]
    assert len(updates) == 2 * of_epoch
    assert measured == list(range(first(of_epoch) + 1, updates[-1] + 1))


@pytest.mark.parametrize(
    "max_epoch, max_update, update_freq, skip, expected",
    [
        (3, 0, [1], False, 30),
        (3, 25, [1], False, 25),
        (3, 50, [1], False, 30),
        (0, 50, [1], False, 50),
        (0, 0, [1], False, math.inf),
        (3, 0, [4], False, 9),
        (3, 0, [4], True, 6),
        (3, 0, [1, 4], False, 16),
    ],
)
def test_updates_are_counted(max_epoch, max_update, update_freq, skip, expected):
    optimization = SimpleNamespace(
        max_epoch=max_epoch, max_update=max_update, update_freq=update_freq, skip_remainder_batch=skip
    )
    assert count_updates(optimization, 10) == expected
    assert count_updates(optimization, None) == (max_update or math.inf)


def test_a_share_of_an_unknown_number_of_updates_is_refused(corpus):
    """Epochs that take turns with parts of the data may have different numbers of batches."""
    for data, flags in ((corpus / "bin", []), (f"{corpus}/bin:{corpus}/bin", ["--max-update", "9"])):
        trainer_and_batches(configuration(data, *SHARE, *flags))
    with pytest.raises(SystemExit, match=r"ascent_from is 0.5, a share .* but their number is unknown"):
        trainer_and_batches(configuration(f"{corpus}/bin:{corpus}/bin", *SHARE))


class Stream(IterableDataset):
    """Batches that are read one after the other."""

    def __init__(self, dataset):
        self.dataset = dataset

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return 3

    def __iter__(self):
        return (self.dataset.collater([self.dataset[i] for i in range(j, j + 20)]) for j in (0, 20, 40))


def test_a_stream_of_batches_has_no_known_length(corpus, monkeypatch):
    def stream(task, dataset, *args, **options):
        return StreamingEpochBatchIterator(Stream(dataset), 1, collate_fn=lambda batches: batches[0])

    monkeypatch.setattr(TranslationTask, "get_batch_iterator", stream)
    cfg = configuration(corpus / "bin", "--optimizer", "asam")
    trainer, batches = trainer_and_batches(cfg, torch.float32)
    assert trainer.train_step([batches[0]])["sharpness"] > 0
    with pytest.raises(SystemExit, match="their number is unknown"):
        trainer_and_batches(configuration(corpus / "bin", *SHARE))


def test_a_program_may_make_batches_without_the_trainer(corpus):
    """Of which the task then does not learn how many updates there are."""
    cfg = configuration(corpus / "bin", "--optimizer", "asam")
    trainer, batches = trainer_and_batches(cfg, torch.float32)
    trainer.task.first_ascent = None
    assert trainer.train_step([batches[0]])["sharpness"] > 0
    trainer, batches = trainer_and_batches(configuration(corpus / "bin", *SHARE))
    trainer.task.first_ascent = None
    with pytest.raises(SystemExit, match="their number is unknown"):
        trainer.train_step([batches[0]])


def test_a_start_beyond_the_end_is_refused_before_training(fairseq, corpus, tmp_path):
    flags = ["--optimizer", "asam", "--ascent-from", "1000", "--max-epoch", "1"]
    result = fairseq("train", *recipe(corpus / "bin", tmp_path / "run", *flags), *PLUGIN)
    assert result.status == 1
    assert result.output.splitlines()[-1].startswith("fairseq_asam: ascent_from is 1000, but training ends")
    assert "train_inner" not in result.output
