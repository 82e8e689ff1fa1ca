"""The plugin under the real command lines: fairseq-train, fairseq-generate, checkpoints, logs."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import PLUGIN, ROOT, assert_other_weights, assert_same_state, checkpoint, recipe

SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def train(fairseq, corpus, tmp_path):
    """Run fairseq-train into a folder of the test's own, and return its output and last checkpoint."""

    def run(name, *flags, plugin=True):
        plugin_flags = PLUGIN if plugin else []
        result = fairseq("train", *recipe(corpus / "bin", tmp_path / name, *flags), *plugin_flags)
        assert result.status == 0, result.output[-3000:]
        return result.output, checkpoint(tmp_path / name)

    return run


def logged(output, tag="train"):
    """The JSON log lines of *tag*, with numbers as numbers."""
    return [
        {key: float(value) for key, value in json.loads(line).items()}
        for line in re.findall(rf"\| {tag} \| (\{{.*\}})", output)
    ]


def test_adam_with_the_plugin_is_a_run_without_it(train, corpus, tmp_path):
    """From its beginning, and resumed: in another epoch than the first fairseq makes other batches."""
    adam = ["--optimizer", "adam", "--dropout", "0.2", "--max-epoch"]
    _, without = train("without", *adam, "2", plugin=False)
    output, with_plugin = train("with", *adam, "2")
    assert_same_state(without, with_plugin)
    assert "sharpness" not in output
    _, with_plugin = train("with", *adam, "3")
    # A process of its own, in which torch 2.6 and newer load what fairseq saves.
    arguments = map(str, recipe(corpus / "bin", tmp_path / "without", *adam, "3"))
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    command = [sys.executable, "-m", "fairseq_cli.train", *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    without = checkpoint(tmp_path / "without")
    assert_same_state(without, with_plugin)
    assert without["extra_state"]["train_iterator"]["epoch"] == 4


@pytest.mark.parametrize("flags", [["asam"], ["sam"], ["asam", "--ascent-scope", "micro-batch"]])
@pytest.mark.parametrize("update_freq", [pytest.param("1", marks=pytest.mark.slow), "3"])
def test_rho_zero_is_adam(train, flags, update_freq):
    """With dropout on: both passes draw the same masks."""
    common = ["--max-epoch", "2", "--dropout", "0.2", "--clip-norm", "0.5", "--update-freq", update_freq]
    _, adam = train("adam", "--optimizer", "adam", *common)
    output, asam = train("asam", "--optimizer", *flags, "--rho", "0", *common)
    assert_same_state(adam, asam)
    assert [line["train_sharpness"] for line in logged(output)] == [0.0, 0.0]


def test_fresh_masks_are_other_masks_only_under_dropout(train):
    rho_zero = ["--optimizer", "asam", "--rho", "0", "--max-epoch", "1"]
    for dropout, same in (("0.0", True), ("0.2", False)):
        _, adam = train(f"adam{dropout}", "--optimizer", "adam", "--max-epoch", "1", "--dropout", dropout)
        _, fresh = train(f"fresh{dropout}", *rho_zero, "--fresh-masks", "--dropout", dropout)
        if same:
            assert_same_state(adam, fresh)
        else:
            assert_other_weights(adam, fresh)


def test_asam_learns_and_logs_the_sharpness(train):
    output, _ = train("asam", "--optimizer", "asam", "--max-epoch", "4", "--log-interval", "5")
    epochs = logged(output)
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"] - 1.0
    assert all(0.0 < epoch["train_sharpness"] < epoch["train_loss"] for epoch in epochs)
    assert all(line["sharpness"] > 0.0 for line in logged(output, "train_inner"))
    assert all("valid_sharpness" not in epoch for epoch in logged(output, "valid"))
    # to first order sharpness is proportional to rho
    smaller = logged(train("smaller", "--optimizer", "asam", "--max-epoch", "1", "--rho", "0.1")[0])
    assert smaller[0]["train_sharpness"] == pytest.approx(epochs[0]["train_sharpness"] / 2, rel=0.15)


@pytest.mark.parametrize("log_interval", ["1", "2"])
def test_an_interval_logs_no_sharpness_where_it_measures_none(train, log_interval):
    """It measures updates 1, 4 and 7, and so none of the line that updates 5 and 6 share."""
    flags = ["--optimizer", "asam", "--ascent-interval", "3", "--max-update", "8"]
    output, _ = train("run", *flags, "--log-interval", log_interval)
    inner = [json.loads(line) for line in re.findall(r"\| train_inner \| (\{.*\})", output)]
    assert len(inner) == 8 // int(log_interval)
    measured = [float(line["sharpness"]) for line in inner if "sharpness" in line]
    assert len(measured) == 3 and all(sharpness > 0.0 for sharpness in measured)
    assert "null" not in output and "None" not in output.split("train_inner", 1)[1]


def test_every_flag_of_adam_and_of_ours_is_taken(train):
    """The flags change the run; the values reach the checkpoint's configuration."""
    adam = ["--adam-betas", "(0.9, 0.98)", "--adam-eps", "1e-7", "--weight-decay", "0.01"]
    ours = ["--rho", "0.5", "--eta", "0.1", "--p-norm", "inf", "--normalization", "filter-wise"]
    _, saved = train("run", "--optimizer", "asam", "--max-epoch", "1", *adam, *ours, "--normalize-bias")
    cfg = saved["cfg"]["optimizer"]
    assert {k: cfg[k] for k in ("rho", "eta", "p_norm", "normalization", "normalize_bias")} == {
        "rho": 0.5,
        "eta": 0.1,
        "p_norm": math.inf,
        "normalization": "filter-wise",
        "normalize_bias": True,
    }
    group = saved["last_optimizer_state"]["param_groups"][0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-7, 0.01)
    _, default = train("default", "--optimizer", "asam", "--max-epoch", "1", *adam)
    assert_other_weights(saved, default)


def test_the_paper_s_values_are_the_defaults(train):
    for name, rho in (("asam", 0.2), ("sam", 0.1)):
        cfg = train(name, "--optimizer", name, "--max-update", "1")[1]["cfg"]["optimizer"]
        assert (cfg["rho"], cfg["p_norm"], cfg["ascent_scope"]) == (rho, 2.0, "update")
        if name == "asam":
            assert (cfg["eta"], cfg["normalization"], cfg["normalize_bias"]) == (0.01, "element-wise", False)


@pytest.mark.parametrize(
    "optimizer",
    [
        ["asam", "--ascent-interval", "5"],
        ["asam", "--ascent-direction", "momentum", "--normalization", "adam"],
        ["asam", "--ascent-direction", "random"],
        pytest.param(["asam"], marks=pytest.mark.slow),
        pytest.param(["sam", "--ascent-fraction", "0.5"], marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_is_uninterrupted(train, optimizer):
    """Stopped inside an epoch and between two."""
    flags = ["--optimizer", *optimizer, "--dropout", "0.2"]
    _, uninterrupted = train("whole", *flags, "--max-epoch", "4")
    updates = uninterrupted["optimizer_history"][-1]["num_updates"]
    stops = (["--max-update", str(updates // 8)], ["--max-epoch", "2"], ["--max-update", str(updates - 3)])
    for stop in stops:
        train("pieces", *flags, *stop)
    _, resumed = train("pieces", *flags, "--max-epoch", "4")
    assert_same_state(uninterrupted, resumed)


def test_a_run_resumes_with_the_bleu_of_its_validation(train):
    """fairseq's recipe for IWSLT'14 validates by BLEU, whose counts stand in the checkpoint as arrays."""
    bleu = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_b": 10}', "--eval-bleu-remove-bpe"]
    bleu += ["--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"]
    train("run", "--optimizer", "asam", "--max-epoch", "1", *bleu)
    output, saved = train("run", "--optimizer", "asam", "--max-epoch", "2", *bleu)
    assert [epoch["epoch"] for epoch in logged(output)] == [2]
    assert saved["extra_state"]["best"] == logged(output, "valid")[-1]["valid_best_bleu"] >= 0.0


def test_runs_change_between_adam_and_asam_with_their_moments(train):
    train("run", "--optimizer", "adam", "--max-epoch", "1")
    output, _ = train("run", "--optimizer", "asam", "--max-epoch", "2")
    assert len(logged(output)) == 1 and logged(output)[0]["train_sharpness"] > 0
    _, saved = train("run", "--optimizer", "adam", "--max-epoch", "3")
    (first, *_) = saved["last_optimizer_state"]["state"].values()
    assert first["step"] == saved["optimizer_history"][-1]["num_updates"]


def test_a_run_that_gives_up_its_interval_keeps_no_component(train):
    """It would take memory, and a place in every checkpoint."""
    kept = []
    for epoch, interval in (("1", "3"), ("2", "1")):
        flags = ["--optimizer", "asam", "--ascent-interval", interval, "--max-epoch", epoch]
        _, saved = train("run", *flags)
        states = saved["last_optimizer_state"]["state"].values()
        kept.append(["ascent_component" in state for state in states])
    assert all(kept[0]) and not any(kept[1])


def test_an_asam_checkpoint_translates_with_and_without_the_plugin(train, fairseq, corpus, tmp_path):
    train("run", "--optimizer", "asam", "--max-epoch", "15", "--dropout", "0")
    saved = tmp_path / "run" / "checkpoint_best.pt"
    arguments = [corpus / "bin", "--path", saved, "--cpu", "--beam", "2", "--max-sentences", "50"]
    arguments += ["--remove-bpe", "sentencepiece", "--scoring", "sacrebleu"]
    with_plugin = fairseq("generate", *arguments, *PLUGIN)
    assert with_plugin.status == 0, with_plugin.output[-3000:]
    bleu = float(re.search(r"BLEU[^=]*= ([\d.]+)", with_plugin.output).group(1))
    assert bleu > 5.0
    # A process that has never heard of the plugin. Two obstacles are torch's alone: weights_only=True from
    # 2.6 on, and a private function that the encoder of fairseq 0.12.2 calls if it may.
    loader = (
        "import sys, functools, torch; torch.load = functools.partial(torch.load, weights_only=False); "
        "from fairseq.modules.transformer_layer import TransformerEncoderLayerBase as layer; "
        "layer.can_use_fastpath = property(lambda self: False, lambda self, value: None); "
        "from fairseq_cli.generate import cli_main; cli_main(); assert 'fairseq_asam' not in sys.modules"
    )
    command = [sys.executable, "-c", loader, *map(str, arguments)]
    without = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert without.returncode == 0, without.stderr[-3000:]

    def hypotheses(output):
        return sorted(re.findall(r"^H-.*$", output, re.MULTILINE))

    assert hypotheses(without.stdout) == hypotheses(with_plugin.output) != []


def test_the_installed_commands_work_from_the_repository_root(corpus, tmp_path):
    """As the README has it, console scripts and a relative --user-dir."""
    train = [SCRIPTS / "fairseq-train", *recipe(corpus / "bin", tmp_path / "run", "--max-update", "3")]
    command = [*map(str, train), "--user-dir", "fairseq_asam", "--optimizer", "asam"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--rho", "-0.1"], "rho is -0.1, but"),
        (["--p-norm", "1"], "p is 1.0, but"),
        (["--eta", "nan"], "eta is nan, but"),
        (["--normalization", "no-such"], "'no-such' (choose from"),
        (["--ascent-direction", "up"], "'up' (choose from"),
        (
            ["--ascent-direction", "random", "--fresh-masks"],
            "--fresh-masks does not go with --ascent-dir",
        ),
        (["--ascent-fraction", "0"], "--ascent-fraction is 0.0, but"),
        (["--ascent-interval", "0"], "--ascent-interval is 0, but"),
        (["--ascent-reuse", "-1"], "--ascent-reuse is -1.0, but"),
        (["--ascent-fraction", "0.5", "--ascent-interval", "2"], "--ascent-fraction does not go with"),
        (["--bf16"], "--bf16 does not go with --optimizer asam: fairseq-train takes it for a TPU; use"),
        (["--memory-efficient-fp16"], "--memory-efficient-fp16 does not go with --optimizer asam"),
        (["--use-bmuf"], "--use-bmuf does not go with --optimizer asam"),
        (["--ddp-backend", "fully_sharded"], "--ddp-backend fully_sharded does not go with --optimizer asam"),
        (
            ["--zero-sharding", "os", "--normalization", "adam"],
            "--normalization adam with --zero-sharding os does not go with --optimizer asam: a worker has",
        ),
        (
            ["--zero-sharding", "os", "--ascent-interval", "5"],
            "--ascent-interval with --zero-sharding os does not go with --optimizer asam: the component that",
        ),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(fairseq, corpus, tmp_path, flags, sentence):
    arguments = recipe(corpus / "bin", tmp_path / "run", "--optimizer", "asam", *flags, *PLUGIN)
    result = fairseq("train", *arguments)
    assert result.status != 0
    assert sentence in result.output.splitlines()[-1]
    assert "Traceback" not in result.output
    assert not os.path.exists(tmp_path / "run") or os.listdir(tmp_path / "run") == []


def test_a_missing_data_directory_is_named(fairseq, tmp_path):
    arguments = recipe(tmp_path / "nowhere", tmp_path / "run", "--optimizer", "asam", *PLUGIN)
    result = fairseq("train", *arguments)
    assert result.status != 0 and "Traceback" not in result.output
    assert result.output.splitlines()[-1].startswith(f"fairseq_asam: there is no data in {tmp_path}/nowhere")
