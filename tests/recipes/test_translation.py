"""The translation recipe's own scripts, on a tiny corpus with a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu.metrics import CHRF

from tests.commands import ROOT, assert_same_state, checkpoint
from tests.iwslt14_archive import archived, contents

RECIPE = ROOT / "recipes" / "translation"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}
PAIRED = ("-m", "bleu", "--paired-bs", "-f", "json")
TINY = [
    *("--arch", "transformer", "--share-all-embeddings", "--dropout", "0.1"),
    *("--encoder-layers", "1", "--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64"),
    *("--decoder-layers", "1", "--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
    *("--lr", "0.01", "--warmup-updates", "20", "--max-tokens", "600", "--max-epoch", "5", "--cpu"),
]


def run(*command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), env=ENVIRONMENT, text=True, capture_output=True)


def train(corpus: Path, folder: Path, optimizer: str, *flags: str) -> subprocess.CompletedProcess:
    return run(RECIPE / "train.sh", corpus, folder, optimizer, *TINY, *flags)


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    return run(sys.executable, "-m", f"recipes.translation.{name}", *arguments)


def succeeded(process: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished and scored runs of adam and asam."""
    folder = tmp_path_factory.mktemp("runs")
    finished = [folder / "adam", folder / "asam"]
    for each in finished:
        succeeded(train(corpus, each, each.name))
        succeeded(script("score", corpus, each))
    return finished


def test_a_finished_run_is_neither_trained_nor_translated_again(corpus: Path, runs: list[Path]):
    before = {
        file: file.stat().st_mtime_ns for file in runs[0].iterdir() if file.name not in ("lock", "command")
    }
    assert "trained already" in succeeded(train(corpus, runs[0], "adam")).stderr
    assert "BLEU" in succeeded(script("score", corpus, runs[0])).stdout
    assert before == {file: file.stat().st_mtime_ns for file in before}


@contextmanager
def training_in_epoch_3(corpus: Path, folder: Path, optimizer: str) -> Iterator[subprocess.Popen]:
    """A train.sh of its own process group that has written the checkpoint of epoch 2."""
    command = map(str, [RECIPE / "train.sh", corpus, folder, optimizer, *TINY])
    log = folder / "train.log"
    with subprocess.Popen(
        list(command), env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while not (log.exists() and "(epoch 2 @" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        yield process


def test_a_killed_run_goes_on_to_the_weights_of_an_undisturbed_one(
    corpus: Path, runs: list[Path], tmp_path: Path
):
    killed = tmp_path / "asam"
    with training_in_epoch_3(corpus, killed, "asam") as process:
        os.killpg(process.pid, signal.SIGKILL)
    log = killed / "train.log"
    assert "done training" not in log.read_text()

    succeeded(train(corpus, killed, "asam"))
    assert "Loaded checkpoint" in log.read_text()
    assert_same_state(checkpoint(killed), checkpoint(runs[1]))
    succeeded(script("score", corpus, killed))
    results = collected(tmp_path, [runs[1], killed])
    assert [system["epochs"] for system in results["systems"]] == [5, 5]
    assert len({system["best_valid_loss"] for system in results["systems"]}) == 1


def test_a_training_that_outlived_its_script_is_waited_for(corpus: Path, tmp_path: Path):
    with training_in_epoch_3(corpus, tmp_path / "adam", "adam") as process:
        process.kill()
    again = succeeded(train(corpus, tmp_path / "adam", "adam"))
    assert "waiting for its end" in again.stderr
    assert "trained already" in again.stderr
    assert (tmp_path / "adam" / "train.log").read_text().count("done training") == 1


def test_other_flags_for_a_run_with_checkpoints_are_refused(corpus: Path, runs: list[Path]):
    process = train(corpus, runs[0], "adam", "--lr", "0.02")
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert f"'{runs[0]}' holds a run with other data, optimizer or flags" in process.stderr


def lines(file: Path) -> list[str]:
    return file.read_text("utf-8").splitlines()


def test_translations_stand_in_the_order_of_the_corpus(corpus: Path, runs: list[Path]):
    for each in runs:
        assert (each / "test.src").read_bytes() == (corpus / "test.de").read_bytes()
        assert (each / "test.ref").read_bytes() == (corpus / "test.en").read_bytes()
        hypotheses, references = lines(each / "test.hyp"), lines(each / "test.ref")
        assert len(hypotheses) == len(references)
        assert not any("\u2581" in hypothesis for hypothesis in hypotheses)
        in_order, reversed_order = (
            CHRF().corpus_score(order, [references]).score for order in (hypotheses, hypotheses[::-1])
        )
        assert in_order > reversed_order + 1


def collected(out: Path, runs: list[Path]) -> dict:
    succeeded(script("collect", out, *runs))
    return json.loads((out / "results.json").read_text())


def test_the_table_agrees_with_the_sacrebleu_command(runs: list[Path], tmp_path: Path):
    results = collected(tmp_path, runs)
    hypotheses = [each / "test.hyp" for each in runs]
    paired = run("sacrebleu", runs[0] / "test.ref", "-i", *hypotheses, *PAIRED)
    for system, theirs in zip(results["systems"], json.loads(succeeded(paired).stdout)):
        assert system["BLEU"] == pytest.approx(
            {
                "score": theirs["BLEU"]["score"],
                "mean": theirs["BLEU"]["mean"],
                "ci95": theirs["BLEU"]["ci"],
                "p_value": theirs["BLEU"]["p_value"],
            }
        )
    for system, hypothesis in zip(results["systems"], hypotheses):
        chrf = run("sacrebleu", runs[0] / "test.ref", "-i", hypothesis, "-m", "chrf", "-b", "-w", "6")
        assert float(succeeded(chrf).stdout) == pytest.approx(system["chrF2"]["score"], abs=1e-6)


@pytest.mark.parametrize("epoch", [2, 5])
def test_an_epoch_killed_between_its_checkpoint_and_its_training_figures_counts(
    epoch: int, runs: list[Path], tmp_path: Path
):
    killed = tmp_path / "killed"
    shutil.copytree(runs[1], killed)
    log = killed / "train.log"
    whole = log.read_text().splitlines(keepends=True)
    trained = [line for line in whole if "| train |" in line]
    lost = trained.pop(epoch - 1)
    log.write_text("".join(line for line in whole if line != lost))
    seconds = [float(re.search(r'"train_train_wall": "(\d+)"', line)[1]) for line in trained]
    assert len(seconds) == 4

    undisturbed, cut_off = collected(tmp_path, [runs[1], killed])["systems"]
    assert cut_off["epochs"] == undisturbed["epochs"] == 5
    assert cut_off["best_valid_loss"] == undisturbed["best_valid_loss"]
    assert cut_off["last_valid_loss"] == undisturbed["last_valid_loss"]
    assert (cut_off["last_train_loss"] == undisturbed["last_train_loss"]) == (epoch != 5)
    assert cut_off["training_seconds"] == pytest.approx(5 * np.mean(seconds))
    succeeded(script("curves", tmp_path / "curves.png", killed))


def test_pictures_and_samples(runs: list[Path], tmp_path: Path):
    succeeded(script("curves", tmp_path / "curves.png", *runs))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    succeeded(script("samples", tmp_path / "samples.md", *runs))
    samples = (tmp_path / "samples.md").read_text()
    assert samples.count("| source |") == samples.count("| asam |") == 5


def test_bad_input_is_named_in_one_sentence(corpus: Path, tmp_path: Path):
    nothing = tmp_path / "nothing"
    for process, sentence in (
        (train(nothing, tmp_path / "run", "adam"), f"'{nothing}' holds no corpus"),
        (train(corpus, tmp_path / "run", "sgd"), "unknown optimizer 'sgd': choose adam, sam or asam."),
        (script("score", corpus, nothing), f"'{nothing / 'checkpoint_best.pt'}' is missing"),
        (script("collect", tmp_path / "out", nothing), f"'{nothing / 'train.log'}' is missing"),
        (script("curves", tmp_path / "out", nothing), f"'{nothing / 'train.log'}' is missing"),
        (script("samples", tmp_path / "out", nothing), f"'{nothing / 'test.hyp'}' is missing"),
    ):
        assert process.returncode != 0
        assert sentence in process.stderr
        assert len(process.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failing_command_ends_the_progress_bar_with_its_status_and_last_lines(tmp_path: Path):
    failing = "print('first'); print('last'); raise SystemExit(7)"
    process = script("progress", tmp_path / "train.log", sys.executable, "-c", failing)
    assert process.returncode == 7
    assert "first\nlast\n" in process.stderr
    assert f"status 7; all of its output is in {tmp_path / 'train.log'}" in process.stderr
    assert (tmp_path / "train.log").read_text() == "first\nlast\n"


def test_a_wrong_flag_ends_train_sh_with_fairseqs_own_message(corpus: Path, tmp_path: Path):
    process = train(corpus, tmp_path, "adam", "--no-such-flag")
    assert process.returncode == 2
    assert "unrecognized arguments: --no-such-flag" in process.stderr


def test_ending_the_progress_bar_ends_the_training(tmp_path: Path):
    waiting = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = [
        sys.executable,
        "-m",
        "recipes.translation.progress",
        tmp_path / "train.log",
        sys.executable,
        "-c",
        waiting,
    ]
    with subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        while not ((tmp_path / "train.log").exists() and (tmp_path / "train.log").read_text().endswith("\n")):
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "train.log").read_text()), 0)


def test_the_last_epochs_average_in_float64(corpus: Path, tmp_path: Path):
    succeeded(train(corpus, tmp_path / "adam", "adam", "--keep-last-epochs", "2"))
    weights = [checkpoint(tmp_path / "adam", f"checkpoint{epoch}.pt")["model"] for epoch in (4, 5)]
    succeeded(script("average", tmp_path / "adam", tmp_path / "mean", "--last", "2"))
    mean = checkpoint(tmp_path / "mean", "checkpoint_best.pt")["model"]
    assert all(
        torch.equal(mean[name], ((weight.double() + weights[1][name].double()) / 2).float())
        for name, weight in weights[0].items()
    )
    succeeded(script("score", corpus, tmp_path / "mean"))

    too_many = script("average", tmp_path / "adam", tmp_path / "mean", "--last", "3")
    assert "has the checkpoints of 2 epochs, not of 3" in too_many.stderr


def test_rho_is_the_one_with_the_highest_validation_bleu(corpus: Path, tmp_path: Path):
    search = ("embedded", "--data", corpus, "--out", tmp_path, "--optimizers", "asam", "--epochs", "2")
    search += ("--rho", "0.1", "50", "--jobs", "2", "--cpu")
    printed = succeeded(script("rho_search", *search)).stdout
    points = json.loads((tmp_path / "rho_search.json").read_text())
    assert [point["rho"] for point in points] == [0.1, 50]
    for point in points:
        folder = tmp_path / f"asam-2-epochs-rho-{point['rho']:g}-seed-1"
        theirs = run("sacrebleu", corpus / "valid.en", "-i", folder / "valid.hyp", "-b", "-w", "6")
        assert float(succeeded(theirs).stdout) == pytest.approx(point["BLEU"], abs=1e-6)
        assert not (folder / "test.hyp").exists()
    assert points[0]["BLEU"] > points[1]["BLEU"]
    assert "asam: the best rho is 0.1" in printed
    assert (tmp_path / "rho_search.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_table_5_over_two_seeds(corpus: Path, tmp_path: Path):
    table5 = ("embedded", "--data", corpus, "--out", tmp_path, "--seeds", "1", "2", "--epochs", "2")
    succeeded(script("table5", *table5, "--rho", "0.1", "0.2", "--jobs", "2", "--cpu"))
    results = json.loads((tmp_path / "table5.json").read_text())
    names = [row["system"] for row in results["systems"]]
    assert names == ["Adam", "Adam, twice the epochs", "Adam+SAM", "Adam+ASAM"]
    adam = tmp_path / "adam-2-epochs-seed-1" / "test.hyp"
    for row in results["systems"]:
        for scale in ("test BLEU", "test BLEU of tokens"):
            scores = [figures[scale] for figures in row["runs"]]
            assert row["mean"][scale] == pytest.approx(np.mean(scores))
            assert row["sd"][scale] == pytest.approx(np.std(scores, ddof=1))
        if row["system"] != "Adam":
            rho = "" if row["rho"] is None else f"-rho-{row['rho']:g}"
            optimizer = row["system"].split(",")[0].split("+")[-1].lower()
            hypothesis = tmp_path / f"{optimizer}-{row['epochs']}-epochs{rho}-seed-1" / "test.hyp"
            paired = run("sacrebleu", corpus / "test.en", "-i", adam, hypothesis, *PAIRED)
            theirs = json.loads(succeeded(paired).stdout)[1]["BLEU"]
            assert row["runs"][0]["p_value"] == pytest.approx(theirs["p_value"])
            assert row["runs"][0]["test BLEU"] == pytest.approx(theirs["score"])
    assert "| Adam+ASAM |" in (tmp_path / "table5.md").read_text()
    assert {file.name for file in tmp_path.glob("*.png")} == {"rho_search.png", "curves.png"}


@pytest.mark.slow
def test_the_cheaper_forms_beside_adam_and_asam(corpus: Path, tmp_path: Path):
    forms = ("embedded", "--data", corpus, "--out", tmp_path, "--seeds", "1", "--epochs", "1", "--rho", "0.1")
    printed = succeeded(script("cheaper", *forms, "--jobs", "2", "--cpu")).stdout
    results = json.loads((tmp_path / "cheaper.json").read_text())
    names = [row["system"] for row in results["systems"]]
    assert names[:2] == ["Adam", "ASAM"] and names[2:5] == [f"fraction {f}" for f in ("0.5", "0.25", "0.125")]
    assert names[5:] == ["interval 2", "interval 5", "interval 2, alpha 0.7", "interval 5, alpha 0.7"]
    losses = {(row["mean"]["best_valid_loss"], row["mean"]["last_train_loss"]) for row in results["systems"]}
    assert len(losses) == len(names)
    assert (tmp_path / "asam-1-epochs-rho-0.1-ascent-fraction-0.25-seed-1" / "test.hyp").exists()
    assert "| interval 5 |" in printed
    assert (tmp_path / "cheaper.png").read_bytes().startswith(b"\x89PNG")


def test_a_launcher_starts_several_workers(corpus: Path, tmp_path: Path):
    """fairseq takes ranks from torchrun on GPUs alone; on a CPU they have to be passed on."""
    worker = tmp_path / "worker"
    worker.write_text(
        '#!/bin/sh\nexec "$@" --distributed-rank "$RANK" --distributed-world-size 2 '
        "--distributed-init-method env:// --distributed-no-spawn"
    )
    worker.chmod(0o755)
    launcher = {"LAUNCHER": f"torchrun --nproc_per_node 2 --no-python {worker}"}
    gloo = ("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--max-epoch", "1")
    command = map(str, (RECIPE / "train.sh", corpus, tmp_path / "run", "asam", *TINY, *gloo))
    succeeded(subprocess.run(list(command), env={**ENVIRONMENT, **launcher}, text=True, capture_output=True))
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("training on 2 devices") == 1
    assert log.count("done training") == 1


def test_a_dry_run_shows_the_jobs_of_a_cluster(corpus: Path, tmp_path: Path):
    values = ("common.seed=1,2,3", "optimizer.rho=0.1,0.2", "hydra.launcher.partition=gpu")
    out = tmp_path / "sweep"
    printed = succeeded(run(RECIPE / "cluster.sh", "--dry-run", corpus, out, *values)).stdout
    assert "#SBATCH --array=0-5%6\n" in printed
    assert "#SBATCH --partition=gpu\n" in printed
    assert f"-m submitit.core._submit {out}/.submitit/%j" in printed
    jobs = [line for line in printed.splitlines() if line.startswith("#5 : ")]
    assert len(jobs) == 1 and jobs[0].endswith("common.seed=3 optimizer.rho=0.2")
    assert not out.exists()

    wrong = run(RECIPE / "cluster.sh", "--dry-run", tmp_path, out)
    assert wrong.returncode == 1
    assert f"'{tmp_path}' holds no corpus" in wrong.stderr


@pytest.mark.slow
def test_the_papers_experiment_on_an_archive_like_its_own(tmp_path: Path):
    """table5.py iwslt14, but for the size of the model: best checkpoint by BLEU, text detokenized."""
    archive, corpus, out = (tmp_path / name for name in ("de-en.tgz", "iwslt14", "out"))
    archived(archive, contents())
    prepare = (sys.executable, "-m", "data_prep.iwslt14", str(corpus), "--archive", str(archive))
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
    size = [f"--{side}-{what}" for side in ("encoder", "decoder") for what in ("layers=1", "embed-dim=32")]
    size += ["--encoder-attention-heads=2", "--decoder-attention-heads=2", "--warmup-updates=20", "--lr=5e-3"]
    few = ("--epochs", "2", "--seeds", "1", "--rho", "0.1", "--jobs", "2", "--cpu", *size)
    printed = succeeded(script("table5", "iwslt14", "--data", corpus, "--out", out, *few)).stdout
    assert "| Adam+ASAM | " in printed and " | 35.66 | 35.02 |" in printed
    run_folder = out / "asam-2-epochs-rho-0.1-seed-1"
    assert "best_bleu" in (run_folder / "train.log").read_text()
    assert "arch='transformer_iwslt_de_en'" in (run_folder / "train.log").read_text()
    tokens, text = lines(corpus / "test.en"), lines(run_folder / "test.ref")
    assert any(" ." in line for line in tokens) and not any(" ." in line for line in text)
    assert not any("@@" in line for line in lines(run_folder / "test.hyp"))
