"""Which checkpoints load with the plugin, and what it leaves of fairseq as it is."""

import argparse
import io
import os
import pickle
import shutil
import stat
import zipfile

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.checkpoint_utils import load_checkpoint_to_cpu, torch_persistent_save
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from omegaconf import open_dict

from fairseq_asam.tasks.checkpoints import copied_whole_or_not_at_all
from tests.commands import assert_same_state, checkpoint, recipe
from tests.training import configuration, trainer_and_batches

# A task that keeps its dictionary in checkpoints, as HuBERT and fine-tuning on speech do.
TASK_WITH_STATE = """
import fairseq_asam.tasks
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

@register_task("translation_with_state", dataclass=TranslationConfig)
class TranslationWithState(TranslationTask):
    def __init__(self, cfg, src_dict, tgt_dict):
        super().__init__(cfg, src_dict, tgt_dict)
        self.state.add_factory("dictionaries", lambda: [tgt_dict, None])
        assert len(self.state.dictionaries) == 2
"""


def test_a_run_whose_task_keeps_its_dictionary_resumes_to_the_bit(fairseq, corpus, tmp_path):
    (tmp_path / "task_with_state").mkdir()
    (tmp_path / "task_with_state" / "__init__.py").write_text(TASK_WITH_STATE)
    flags = ["--user-dir", tmp_path / "task_with_state", "--task", "translation_with_state"]
    flags += ["--optimizer", "asam", "--dropout", "0.2"]
    for folder, epochs in (("whole", 2), ("pieces", 1), ("pieces", 2)):
        result = fairseq("train", *recipe(corpus / "bin", tmp_path / folder, *flags, "--max-epoch", epochs))
        assert result.status == 0, result.output[-3000:]
    whole, pieces = (checkpoint(tmp_path / folder) for folder in ("whole", "pieces"))
    assert_same_state(whole, pieces)
    expected = Dictionary.load(str(corpus / "bin" / "dict.en.txt"))
    for state in (pieces, load_checkpoint_to_cpu(str(tmp_path / "pieces" / "checkpoint_last.pt"))):
        dictionary, nothing = state["task_state"]["dictionaries"]
        assert dictionary.symbols == expected.symbols and dictionary.indices == expected.indices
        assert nothing is None


def batches_of(epoch, trainer, resumed):
    """The sentences of each batch of *epoch*, after all epochs before it unless *resumed* there."""
    first = epoch if resumed else 1
    iterator = trainer.get_train_iterator(first)
    if resumed:
        iterator.load_state_dict({"version": 2, "epoch": epoch})
    for number in range(first, epoch + 1):
        if number > first:
            iterator = trainer.get_train_iterator(number, load_dataset=False)
        shuffle = number > trainer.cfg.dataset.curriculum
        batches = [batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=shuffle)]
        assert iterator.epoch == number
    return batches


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--update-ordered-indices-seed"],
        ["--update-ordered-indices-seed", "--update-epoch-batch-itr", "True"],
        ["--curriculum", "2"],
    ],
)
def test_a_resumed_epoch_has_the_batches_of_an_uninterrupted_run(corpus, flags, rebuild):
    """*rebuild*: as in tasks of speech, which make batches anew in each epoch.

    Uninterrupted, they are the batches of Adam, but for a curriculum, after which fairseq goes on with the
    order of its first epoch.
    """
    found = []
    for optimizer, resumed in (("asam", False), ("asam", True), ("adam", False)):
        trainer, _ = trainer_and_batches(configuration(corpus / "bin", "--optimizer", optimizer, *flags))
        trainer.task.dataset_to_epoch_iter.clear()
        with open_dict(trainer.task.cfg):
            trainer.task.cfg.rebuild_batches = rebuild
        found.append(batches_of(3, trainer, resumed))
    assert found[0] == found[1]
    assert found[0] == found[2] or "--curriculum" in flags


def test_data_in_parts_have_the_batches_of_adam(corpus):
    """Each epoch has a part of its own, also the first one of a run that resumes."""
    found, data = [], f"{corpus}/bin:{corpus}/bin"
    for optimizer in ("asam", "adam"):
        flags = ["--optimizer", optimizer, "--update-ordered-indices-seed"]
        trainer, _ = trainer_and_batches(configuration(data, *flags))
        iterator = trainer.get_train_iterator(3, disable_iterator_cache=True)
        found.append([batch["id"].tolist() for batch in iterator.next_epoch_itr(shuffle=False)])
    assert found[0] == found[1]


def save(path, **entries):
    """Save the least that fairseq takes for a checkpoint, with *entries*."""
    history = [{"num_updates": 1, "criterion_name": "", "lr_scheduler_state": {}}]
    least = {"args": None, "cfg": None, "model": {}, "optimizer_history": history, "extra_state": {}}
    torch.save({**least, **entries}, path)
    return str(path)


def test_what_meters_and_arguments_hold_loads(tmp_path):
    numbers = [np.float64(0.5), np.float32(0.5), np.int64(-3), np.bool_(True), np.arange(4.0), np.arange(3)]
    arguments = argparse.Namespace(lr=[0.1], langs={"de": 1}, more=argparse.Namespace(deep=True))
    loaded = load_checkpoint_to_cpu(save(tmp_path / "saved.pt", numbers=numbers, arguments=arguments))
    assert loaded["arguments"] == arguments
    for number, was in zip(loaded["numbers"], numbers):
        assert type(number) is type(was) and number.dtype == was.dtype and np.array_equal(number, was)


@pytest.mark.skipif(np.__version__.startswith("1."), reason="with numpy 1 there is no other name")
def test_a_checkpoint_saved_with_numpy_1_loads_with_numpy_2(tmp_path):
    """As a run that began with Python 3.10 and goes on with 3.11."""
    numbers = [np.float64(0.5), np.arange(4.0)]
    path = save(tmp_path / "numpy_2.pt", numbers=numbers)
    renamed = 0
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(tmp_path / "numpy_1.pt", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            renamed += content.count(b"cnumpy._core.multiarray\n")
            old.writestr(name, content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert renamed == 2
    scalar, array = load_checkpoint_to_cpu(str(tmp_path / "numpy_1.pt"))["numbers"]
    assert scalar == 0.5 and array.tolist() == [0.0, 1.0, 2.0, 3.0]


class Evil:
    """What runs a command when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.skipif(not hasattr(torch.serialization, "add_safe_globals"), reason="this torch loads anything")
@pytest.mark.parametrize("place", ["model", "dictionary", "arguments"])
def test_loading_stays_safe(tmp_path, place):
    """The plugin allows some types; it does not switch torch's safety off, within them either."""
    evil, dictionary = Evil(tmp_path / "ran"), Dictionary()
    if place == "model":
        entries = {"model": evil}
    elif place == "dictionary":
        dictionary.symbols = evil
        entries = {"task_state": {"dictionaries": [dictionary]}}
    else:
        entries = {"args": argparse.Namespace(lr=evil)}
    path = save(tmp_path / "evil.pt", **entries)
    with pytest.raises(pickle.UnpicklingError, match=r"weights_only|Weights only"):
        load_checkpoint_to_cpu(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize("failures", [2, 3])
def test_an_attempt_to_save_begins_where_the_file_does(tmp_path, monkeypatch, failures):
    """fairseq tries three times, for the disk may be full for a moment."""
    save_whole, attempts = torch.save, []

    def save_after_failures(state, file):
        attempts.append(file.tell())
        if len(attempts) <= failures:
            file.write(b"the beginning of a file" * 1000)
            raise OSError("No space left on device")
        save_whole(state, file)

    monkeypatch.setattr(torch, "save", save_after_failures)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    if failures == 3:
        with pytest.raises(OSError, match="No space left"):
            torch_persistent_save({"a": 1}, str(tmp_path / "saved.pt"))
    else:
        torch_persistent_save({"a": 1}, str(tmp_path / "saved.pt"))
        assert torch.load(tmp_path / "saved.pt") == {"a": 1}
        assert b"the beginning of a file" not in (tmp_path / "saved.pt").read_bytes()
    assert attempts == [0, 0, 0]


def test_what_cannot_be_rewound_is_saved_to_all_the_same():
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        checkpoint_utils._torch_persistent_save({"a": 1}, file)
    with open(reading, "rb") as file:
        assert torch.load(io.BytesIO(file.read())) == {"a": 1}


def save_in(folder, trainer):
    """Save as fairseq-train does at the end of an epoch: one file is written and then copied to the other."""
    cfg = trainer.cfg.checkpoint
    cfg.save_dir, cfg.no_epoch_checkpoints = str(folder), True
    iterator = trainer.get_train_iterator(1)
    for _ in iterator.next_epoch_itr():
        pass
    checkpoint_utils.save_checkpoint(cfg, trainer, iterator, 1.0)


@pytest.fixture
def trainer(corpus, monkeypatch):
    monkeypatch.delattr(checkpoint_utils.save_checkpoint, "best", raising=False)
    return trainer_and_batches(configuration(corpus / "bin", "--optimizer", "asam"))[0]


def test_a_copy_that_breaks_off_leaves_the_last_checkpoint_whole(trainer, tmp_path, monkeypatch):
    (tmp_path / "checkpoint_last.pt").write_text("the last one")

    def broken_off(source, destination):
        with open(destination, "w") as file:
            file.write("half of")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", broken_off)
    with pytest.raises(KeyboardInterrupt):
        save_in(tmp_path, trainer)
    assert (tmp_path / "checkpoint_last.pt").read_text() == "the last one"


def test_a_copy_that_failed_without_an_exception_replaces_nothing(trainer, tmp_path, monkeypatch):
    """As iopath's copy does, which fairseq uses where it is installed."""
    (tmp_path / "checkpoint_last.pt").write_text("the last one")
    monkeypatch.setattr(shutil, "copyfile", lambda source, destination: False)
    with pytest.raises(AssertionError, match="Failed to copy"):
        save_in(tmp_path, trainer)
    assert (tmp_path / "checkpoint_last.pt").read_text() == "the last one"


def test_a_copy_that_may_not_overwrite_does_not(tmp_path):
    """As iopath's copy, unless it is told to."""

    def as_iopath(source, destination, overwrite=False):
        if os.path.exists(destination) and not overwrite:
            return False
        return bool(shutil.copyfile(source, destination))

    copy, new, there = copied_whole_or_not_at_all(as_iopath), tmp_path / "new", tmp_path / "there"
    new.write_text("new")
    there.write_text("there before")
    assert not copy(str(new), str(there)) and there.read_text() == "there before"
    assert copy(str(new), str(there), overwrite=True) and there.read_text() == "new"


@pytest.mark.parametrize("there", [True, False])
def test_a_last_checkpoint_that_is_a_link_is_written_through(trainer, tmp_path, there):
    """To another folder, relative, and through a second link."""
    (tmp_path / "run").mkdir()
    (tmp_path / "large disk").mkdir()
    behind = tmp_path / "large disk" / "last.pt"
    if there:
        behind.write_text("the last one")
    links = tmp_path / "run" / "checkpoint_last.pt", tmp_path / "run" / "second.pt"
    links[0].symlink_to("second.pt")
    links[1].symlink_to("../large disk/last.pt")
    save_in(tmp_path / "run", trainer)
    assert all(link.is_symlink() for link in links)
    assert behind.read_bytes() == (tmp_path / "run" / "checkpoint_best.pt").read_bytes()
    assert {path.name for path in tmp_path.rglob("*.tmp")} == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a device")
def test_a_last_checkpoint_may_be_a_device(trainer, tmp_path):
    """As a link to /dev/null, for who wants none."""
    null = tmp_path / "null"
    os.mknod(null, stat.S_IFCHR | 0o600, os.stat("/dev/null").st_rdev)
    (tmp_path / "checkpoint_last.pt").symlink_to(null)
    save_in(tmp_path, trainer)
    assert null.is_char_device() and (tmp_path / "checkpoint_last.pt").is_symlink()


@pytest.fixture(params=["post-norm", "pre-norm"])
def transformer(request):
    """A small Transformer of fairseq, with random weights, that has never been trained."""
    words = Dictionary()
    for word in "abcdefgh":
        words.add_symbol(word)
    config = TransformerConfig()
    for part in (config.encoder, config.decoder):
        part.layers, part.embed_dim, part.ffn_embed_dim, part.attention_heads = 2, 8, 16, 2
        part.normalize_before = request.param == "pre-norm"
    config.decoder.input_dim = config.decoder.output_dim = 8
    torch.manual_seed(1)
    task = argparse.Namespace(source_dictionary=words, target_dictionary=words)
    return TransformerModelBase.build_model(config, task)


def test_torchscript_compiles_a_transformer(transformer):
    transformer.eval()
    source = torch.tensor([[4, 5, 6, 2], [7, 8, 9, 2]])
    lengths = torch.tensor([4, 4])
    layer, x = transformer.encoder.layers[0], torch.randn(4, 2, 8)
    torch.testing.assert_close(torch.jit.script(layer)(x, None), layer(x, None))
    encoder = transformer.encoder
    scripted = torch.jit.script(encoder)(source, lengths)["encoder_out"][0]
    torch.testing.assert_close(scripted, encoder(source, lengths)["encoder_out"][0])
    scores = transformer(source, lengths, source)[0]
    torch.testing.assert_close(torch.jit.script(transformer)(source, lengths, source)[0], scores)


def test_a_loaded_encoder_takes_padding_on_either_side(transformer):
    """In fairseq 0.12.2 with torch 2, a model that was loaded and not trained fails on it."""
    transformer.load_state_dict(transformer.state_dict())
    encoder, pad = transformer.eval().encoder, 1
    alone = encoder(torch.tensor([[5, 2]]), torch.tensor([2]))["encoder_out"][0][:, 0]
    left = encoder(torch.tensor([[4, 5, 6, 2], [pad, pad, 5, 2]]), torch.tensor([4, 2]))["encoder_out"][0]
    right = encoder(torch.tensor([[4, 5, 6, 2], [5, 2, pad, pad]]), torch.tensor([4, 2]))["encoder_out"][0]
    torch.testing.assert_close(left[2:, 1], alone)
    torch.testing.assert_close(right[:2, 1], alone)
