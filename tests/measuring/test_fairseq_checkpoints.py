"""The commands that measure and draw fairseq checkpoints, on a tiny corpus with tiny models."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_asam.measuring import __main__ as sharpness
from fairseq_asam.measuring.fairseq_checkpoints import DatasetLoss, load
from recipes.paper import surface
from tests.commands import PLUGIN, ROOT, checkpoint, recipe, start

LANGUAGE_MODEL = [
    *("--task", "language_modeling", "--arch", "transformer_lm", "--tokens-per-sample", "40"),
    *("--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
]


def trained(folder: Path, data: Path, *flags) -> str:
    arguments = recipe(data, folder, "--max-epoch", "3", *flags)
    process = start("train", arguments, folder.with_suffix(".log"))
    process.join()
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()
    return str(folder / "checkpoint_last.pt")


@pytest.fixture(scope="module")
def data(corpus) -> str:
    return str(corpus / "bin")


@pytest.fixture(scope="module")
def adam(corpus, tmp_path_factory) -> str:
    """A checkpoint trained without the plugin."""
    return trained(tmp_path_factory.mktemp("runs") / "adam", corpus / "bin", "--optimizer", "adam")


@pytest.fixture(scope="module")
def asam(corpus, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "asam"
    languages = ["--source-lang", "de", "--target-lang", "en"]
    flags = ["--optimizer", "asam", "--checkpoint-activations", *languages]
    return trained(folder, corpus / "bin", *flags, *PLUGIN)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``main`` of a module with arguments and return what it printed."""

    def run(module, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments), "--cpu"])
        module.main()
        return capsys.readouterr().out

    return run


def used_weights(loaded):
    """fairseq 0.12.2 has weights that it uses in inference alone, and never in a loss."""
    return {name: p for name, p in loaded.model.named_parameters() if p.grad is not None}


def sentence_by_sentence(path: str, data: str, move=None) -> float:
    """The loss per token of the sentences one by one, after the weights moved by what *move* makes of name,
    weights and gradients."""
    loaded = load(path, data, cpu=True)
    loaded.task.load_dataset("valid")
    dataset = loaded.task.dataset("valid")

    def loss_at_weights(with_gradient: bool) -> float:
        total, tokens = 0.0, 0
        for i in range(len(dataset)):
            loss, size, _ = loaded.criterion(loaded.model, dataset.collater([dataset[i]]))
            if with_gradient:
                loss.backward()
            total, tokens = total + loss.item(), tokens + size
        return total / tokens

    loss = loss_at_weights(True)
    if move is None:
        return loss
    weights = {name: p.detach().clone() for name, p in used_weights(loaded).items()}
    gradients = {name: p.grad for name, p in used_weights(loaded).items()}
    with torch.no_grad():
        for name, p in used_weights(loaded).items():
            p += move(name, weights, gradients)
        return loss_at_weights(False)


def test_the_figures_are_those_of_the_definition(command, adam, data, tmp_path):
    rho, eta = 0.3, 0.02

    def sam(name, weights, gradients):
        return rho * gradients[name] / torch.cat([g.flatten() for g in gradients.values()]).norm()

    def asam(name, weights, gradients):
        diagonals = {n: 1.0 if n.endswith("bias") else w.abs() + eta for n, w in weights.items()}
        norm = torch.cat([(diagonals[n] * g).flatten() for n, g in gradients.items()]).norm()
        return rho * diagonals[name] ** 2 * gradients[name] / norm

    at_w, after_sam, after_asam = (sentence_by_sentence(adam, data, move) for move in (None, sam, asam))
    out = command(
        sharpness, data, "--path", adam, "--rho", rho, 0.1, "--eta", eta, "--json", tmp_path / "out.json"
    )
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["loss"] == pytest.approx(at_w, rel=1e-5)
    first = written["regions"][0]
    assert first["sharpness"] == pytest.approx(after_sam - at_w, rel=1e-3)
    assert first["adaptive_sharpness"] == pytest.approx(after_asam - at_w, rel=1e-3)
    assert first["non_finite"] == 0
    for row in written["regions"]:
        assert f"| 2 | {row['rho']:g} | {row['sharpness']:.6f} | {row['adaptive_sharpness']:.6f} |" in out
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("optimizer", ["adam", "asam"])
def test_the_loss_at_w_is_the_one_that_fairseq_validates(request, optimizer, data):
    path = request.getfixturevalue(optimizer)
    loss = DatasetLoss(load(path, data, cpu=True), "valid")
    assert sum(map(len, loss.batches)) == len(loss.dataset) and loss.skipped == 0
    terms = [(term.item(), tokens) for term, tokens in loss()]
    bits = sum(term for term, _ in terms) / sum(tokens for _, tokens in terms) / math.log(2)
    state = checkpoint(Path(path).parent)["extra_state"]
    assert bits == pytest.approx(state["val_loss"], abs=1e-3)  # fairseq rounds


def test_projected_ascent_and_other_norms(command, asam, data, tmp_path):
    flags = ["--rho", 0.05, "--p-norm", 2, "inf", "--batches", 2, "--seed", 3, "--max-tokens", 200]
    rows = []
    for more in ([], ["--steps", 4, "--restarts", 2]):
        command(sharpness, data, "--path", asam, *flags, *more, "--json", tmp_path / "out.json")
        written = json.loads((tmp_path / "out.json").read_text())
        assert written["batches"] == 2 and written["sentences"] < 100
        rows.append(written["regions"])
    assert [row["p"] for row in rows[0]] == ["2", "inf"]
    for one_step, projected in zip(*rows):
        for key in ("sharpness", "adaptive_sharpness"):
            assert projected[key] >= one_step[key] - 1e-6


def test_random_batches_are_the_same_for_the_same_seed(adam, data):
    loaded = load(adam, data, cpu=True)
    chosen = [DatasetLoss(loaded, "train", 300, 3, seed).batches for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_surface_goes_through_w_and_epsilon(command, adam, asam, data, tmp_path):
    picture = tmp_path / "surface.png"
    same = ["--batches", 1, "--rho", 0.4, "--seed", 5]
    out = command(surface, data, picture, "--path", adam, asam, "--points", 3, "--radius", 0.2, *same)
    assert out.count("0 points are not finite") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(picture.with_suffix(".json").read_text())
    for path in (adam, asam):
        command(sharpness, data, "--path", path, "--json", tmp_path / "measured.json", *same)
        measured = json.loads((tmp_path / "measured.json").read_text())
        loss, rise = written["surfaces"][path]["loss"], measured["regions"][0]["adaptive_sharpness"]
        assert loss[1][1] == pytest.approx(measured["loss"], rel=1e-6)
        assert loss[1][2] - loss[1][1] == pytest.approx(rise, rel=1e-3)
        assert loss[1][0] < loss[1][1] < loss[1][2]


def test_a_random_direction_has_the_lengths_of_the_filters():
    torch.manual_seed(0)
    weights = {"conv": torch.randn(5, 3, 2, 2), "matrix": torch.randn(4, 7), "bias": torch.randn(4)}
    weights["matrix"][2] = 0.0
    direction = surface.filter_normalized_direction(weights, 1)
    for name in ("conv", "matrix"):
        lengths = [x.flatten(1).norm(dim=1) for x in (weights[name], direction[name])]
        torch.testing.assert_close(*lengths)
    assert not direction["bias"].any()
    again, other = (surface.filter_normalized_direction(weights, seed) for seed in (1, 2))
    assert torch.equal(again["conv"], direction["conv"]) and not torch.equal(other["conv"], direction["conv"])


def edited(source: str, folder: Path, edit) -> str:
    shutil.copytree(source, folder)
    edit(folder)
    return str(folder)


def rename_german(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.rename(folder / file.name.replace(".de", ".fr").replace("de-en", "fr-en"))


def add_words(folder: Path) -> None:
    for language in ("de", "en"):
        with open(folder / f"dict.{language}.txt", "a") as file:
            file.write("newword 1\n")


def other_language(folder: Path) -> None:
    """Make the references German, too, which the model never learnt to write."""
    for file in folder.glob("valid.de-en.en.*"):
        shutil.copy(folder / file.name.replace(".en.", ".de."), file)


def test_what_does_not_fit_is_refused_in_a_sentence(adam, asam, corpus, data, tmp_path):
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    monolingual = tmp_path / "monolingual"
    prefixes = [f"--{split}pref={corpus}/{split}.en" for split in ("train", "valid")]
    preprocess = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", *prefixes]
    subprocess.run([*preprocess, f"--destdir={monolingual}"], check=True, capture_output=True)
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
    with pytest.raises(ValueError, match="has no split 'dev'"):
        DatasetLoss(load(adam, data, cpu=True), "dev")
    for options, message in (
        ({"batches": 0}, "the number of batches is 0"),
        ({"max_tokens": -1}, "the size of a batch is -1"),
        ({"max_tokens": 3}, "the size of a batch is 3 tokens, too few"),
    ):
        with pytest.raises(ValueError, match=message):
            DatasetLoss(load(adam, data, cpu=True), "valid", **options)


def test_a_loss_worse_than_guessing_is_pointed_out(command, adam, data, tmp_path):
    flags = ["--path", adam, "--batches", 2, "--rho", 0.1]
    assert "guessing" not in command(sharpness, data, *flags)
    other = edited(data, tmp_path / "other", other_language)
    assert f"is '{other}' the data set of its training?" in command(sharpness, other, *flags)


@pytest.mark.parametrize(
    "module, flags, message",
    [
        ("sharpness", ["--path", "none.pt"], "measuring: the checkpoint 'none.pt' does not exist."),
        ("sharpness", ["--path", "none.pt", "--rho", "-1"], "measuring: rho is -1.0, but"),
        ("surface", ["out.png", "--path", "none.pt", "--points", "4"], "surface: --points is 4, but"),
        ("surface", ["out.jpg", "--path", "none.pt"], "surface: 'out.jpg' is not the name of a PNG file"),
    ],
)
def test_a_mistake_ends_the_command_with_a_line(command, data, module, flags, message):
    with pytest.raises(SystemExit) as end:
        command(globals()[module], data, *flags)
    assert str(end.value).startswith(message)
    assert "\n" not in str(end.value)


def test_the_command_line_prints_nothing_but_the_table(adam, data):
    process = subprocess.run(
        [sys.executable, "-m", "fairseq_asam.measuring", data, "--path", adam, "--rho", "0.1"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert process.returncode == 0
    assert process.stderr == ""
    assert len(process.stdout.splitlines()) == 6
