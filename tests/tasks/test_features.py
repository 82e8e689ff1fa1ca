"""What else a fairseq user switches on. Each feature runs with asam at rho 0, which must be bit for bit the
run with adam and the same flags, and with asam as it is, which must learn."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import (
    PLUGIN,
    ROOT,
    SIZES,
    UNUSED,
    assert_other_weights,
    assert_same_state,
    checkpoint,
    recipe,
)

FEATURES = {
    "ema": ["--store-ema", "--ema-fp32"],
    "layer drop": ["--encoder-layerdrop", "0.5", "--decoder-layerdrop", "0.5", "--encoder-layers", "3"],
    "layer drop, epsilon at intervals": [
        *("--encoder-layerdrop", "0.5", "--encoder-layers", "3", "--ascent-interval", "3"),
    ],
    "checkpoint activations": ["--checkpoint-activations"],
    "accumulation on a schedule": ["--update-freq", "1,3", "--ema-decay", "0.9", "--store-ema"],
    "sentence average": ["--sentence-avg", "--clip-norm", "0.1"],
    "an epsilon for each micro-batch": ["--ascent-scope", "micro-batch", "--update-freq", "2"],
    "normalization layers": ["--perturbed-weights", "normalization-layers"],
    "all but embeddings": ["--perturbed-weights", "all-but-embeddings"],
    "epsilon from a fraction": ["--ascent-fraction", "0.4", "--store-ema"],
    "epsilon from a fraction, for a model that wants no padding": [
        *("--ascent-fraction", "0.3", "--arch", "lstm", "--decoder-out-embed-dim", "32"),
        *(f"--{end}-{size}" for end in ("encoder", "decoder") for size in ("embed-dim=32", "hidden-size=32")),
    ],
    "epsilon at intervals": ["--ascent-interval", "3", "--update-freq", "2", "--clip-norm", "0.1"],
    "epsilon at intervals for each micro-batch": ["--ascent-interval", "3", "--ascent-scope", "micro-batch"],
}
OURS = ["--ascent-scope", "--perturbed-weights", "--ascent-fraction", "--ascent-interval"]
CHEAPER = {"fraction": ["--ascent-fraction", "0.4"], "interval": ["--ascent-interval", "3"]}
ENCODER, DECODER = SIZES[: len(SIZES) // 2], SIZES[len(SIZES) // 2 :]
TASKS = {
    "language_modeling": ["--arch", "transformer_lm", *DECODER, "--tokens-per-sample", "40"],
    "masked_lm": ["--arch", "masked_lm", *ENCODER, "--criterion", "masked_lm", "--tokens-per-sample", "40"],
    "multilingual_translation": ["--arch", "multilingual_transformer", *SIZES, "--lang-pairs", "de-en"],
    "translation_lev": [
        *("--arch", "cmlm_transformer", *SIZES, "--share-all-embeddings", "--noise", "random_mask"),
        *("--criterion", "nat_loss", "--label-smoothing", "0.1"),
    ],
}


@pytest.fixture
def train(fairseq, corpus, tmp_path):
    def run(name, *flags, data=None):
        few = ["--max-epoch", "2", "--max-tokens", "1600"]
        arguments = recipe(data or corpus / "bin", tmp_path / name, *few, *flags)
        result = fairseq("train", *arguments, *PLUGIN)
        assert result.status == 0, result.output[-3000:]
        lines = re.findall(r"\| train \| (\{.*\})", result.output)
        return [float(json.loads(line)["train_loss"]) for line in lines], checkpoint(tmp_path / name)

    return run


def is_adam_at_rho_zero_and_learns(train, *flags, data=None):
    of_adam = [f for f, before in zip(flags, ["", *flags]) if f not in OURS and before not in OURS]
    _, adam = train("adam", "--optimizer", "adam", *of_adam, data=data)
    _, rho_zero = train("rho_zero", "--optimizer", "asam", "--rho", "0", *flags, data=data)
    assert_same_state(adam, rho_zero)
    for key, value in adam["extra_state"].get("ema", {}).items():
        assert UNUSED.search(key) or torch.equal(value, rho_zero["extra_state"]["ema"][key])
    losses, asam = train("asam", "--optimizer", "asam", *flags, data=data)
    assert losses[-1] < losses[0]
    assert_other_weights(asam, adam)
    return asam


#: Features that others of them, or test_matrix.py, test in part.
SLOW = {
    "layer drop",
    "normalization layers",
    "epsilon from a fraction",
    "epsilon at intervals",
    "epsilon at intervals for each micro-batch",
}


@pytest.mark.parametrize(
    "feature", [pytest.param(each, marks=[pytest.mark.slow] if each in SLOW else []) for each in FEATURES]
)
def test_feature(train, feature):
    asam = is_adam_at_rho_zero_and_learns(train, "--dropout", "0.2", *FEATURES[feature])
    assert ("ema" in asam["extra_state"]) == ("--store-ema" in FEATURES[feature])


@pytest.mark.parametrize(
    "task", [pytest.param(each, marks=pytest.mark.slow) if "multi" in each else each for each in TASKS]
)
def test_task(train, task, request):
    data = request.getfixturevalue("monolingual") if "--tokens-per-sample" in TASKS[task] else None
    is_adam_at_rho_zero_and_learns(train, "--task", task, *TASKS[task], data=data)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cheaper", CHEAPER)
def test_less_than_two_passes_in_any_task(train, task, cheaper, request):
    data = request.getfixturevalue("monolingual") if "--tokens-per-sample" in TASKS[task] else None
    losses, _ = train(
        "run", "--task", task, *TASKS[task], "--optimizer", "asam", *CHEAPER[cheaper], data=data
    )
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "base",
    [
        "adafactor",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("nag", "sgd", "adagrad", "adadelta", "adamax")
        ),
    ],
)
def test_any_base_optimizer(train, base):
    """With flags of the base's own, and resumed from its state."""
    flags = {"sgd": ["--momentum", "0.9"], "nag": ["--momentum", "0.9"]}.get(base, ["--weight-decay", "0.01"])
    if base == "adafactor":
        flags = ["--scale-parameter", "--warmup-updates", "20"]
    common = [*flags, "--lr", {"sgd": "0.5", "nag": "0.5", "adadelta": "1.0"}.get(base, "5e-3")]
    _, plain = train("plain", "--optimizer", base, *common)
    _, rho_zero = train("rho_zero", "--optimizer", f"asam_{base}", "--rho", "0", *common)
    assert_same_state(plain, rho_zero)
    losses, _ = train("sam", "--optimizer", f"sam_{base}", *common)
    assert losses[-1] < losses[0]


def test_online_backtranslation_is_refused(fairseq, corpus, tmp_path):
    flags = ["--task", "online_backtranslation", "--optimizer", "asam", "--mono-langs", "de,en"]
    result = fairseq("train", *recipe(corpus / "bin", tmp_path, *flags), *PLUGIN)
    assert result.status != 0 and "Traceback" not in result.output
    assert "--task online_backtranslation does not go with --optimizer asam" in result.output.splitlines()[-1]


def test_sharpness_reaches_tensorboard(train, tmp_path):
    train(
        "run", "--optimizer", "asam", "--tensorboard-logdir", str(tmp_path / "board"), "--log-interval", "5"
    )
    events = EventAccumulator(str(tmp_path / "board" / "train")).Reload()
    assert all(event.value > 0 for event in events.Scalars("sharpness"))


CONFIG = ROOT / "recipes/translation/config/asam.yaml"


def hydra_train(corpus, folder, config, *words):
    """Make an update with the configuration *config*, and return its options of the optimizer."""
    sizes = [
        f"+model.{part}.{size}" for part in ("encoder", "decoder") for size in ("layers=1", "embed_dim=32")
    ]
    command = [
        *(str(Path(sys.executable).parent / "fairseq-hydra-train"), "--config-dir", str(config.parent)),
        *("--config-name", config.stem, f"hydra.run.dir={folder}", "optimization.max_update=2"),
        *(f"task.data={corpus}/bin", "common.cpu=true", "model._name=transformer", *sizes),
        *("+model.encoder.ffn_embed_dim=64", "+model.decoder.ffn_embed_dim=64", *words),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert "train_sharpness" in result.stdout
    return checkpoint(folder / "checkpoints")["cfg"]["optimizer"]


@pytest.mark.parametrize("optimizer", ["asam", pytest.param("sam", marks=pytest.mark.slow)])
def test_hydra_train_with_the_configuration_shipped(corpus, tmp_path, optimizer):
    """The options of the file and of the command line reach the run."""
    words = [f"common.user_dir={ROOT}/fairseq_asam", "optimizer.rho=0.3"]
    words.append(f"common.bf16={optimizer == 'asam'}")
    if optimizer == "sam":
        ours = ("eta", "normalization", "normalize_bias")
        words += ["optimizer._name=sam", *(f"~optimizer.{option}" for option in ours)]
    options = hydra_train(corpus, tmp_path, CONFIG, *words)
    assert (options["_name"], options["rho"], options["adam_betas"]) == (optimizer, 0.3, "(0.9, 0.98)")


def test_hydra_train_with_the_words_of_the_readme(corpus, tmp_path):
    """A configuration of Adam becomes one of ASAM."""
    before, after = CONFIG.read_text().split("  _name: asam", 1)
    config = tmp_path / "config" / "adam.yaml"
    config.parent.mkdir()
    config.write_text(f"{before}  _name: adam\n{after[after.index('  adam_betas') :]}")
    words = re.search(r"takes `(common\.user_dir=\S+ \S+)`", (ROOT / "README.md").read_text())[1]
    options = hydra_train(corpus, tmp_path, config, *words.replace("/path/to/clone", str(ROOT)).split())
    assert (options["_name"], options["rho"], options["adam_betas"]) == ("asam", 0.2, "(0.9, 0.98)")
