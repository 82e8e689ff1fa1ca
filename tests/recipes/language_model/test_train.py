"""The language model with weights in shards: it learns, goes on after an interruption, refuses bad input."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.commands import ROOT

TINY = [
    *("--device", "cpu", "--layers", "2", "--width", "32", "--context", "16", "--batch-size", "8"),
    *("--lr", "5e-3", "--save-every", "100", "--data", str(ROOT / "README.md")),
]

_processes = multiprocessing.get_context("forkserver")


def _main(rank: int, processes: int, port: int, arguments: list[str], log: Path) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    of_torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in of_torchrun.items()})
    from recipes.language_model.train import main

    main(arguments)


def start(folder: Path, processes: int, *arguments) -> list[tuple[int, str]]:
    """Run train.py as torchrun does, but sooner. Return the status and the output of each process."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*TINY, *map(str, arguments)]
    logs = [folder / f"{rank}.log" for rank in range(processes)]
    workers = [
        _processes.Process(target=_main, args=(rank, processes, port, arguments, log))
        for rank, log in enumerate(logs)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)
        worker.kill()
    return [(worker.exitcode, log.read_text()) for worker, log in zip(workers, logs)]


def updates(out: Path, processes: int, count: int, *arguments) -> list[dict[str, float]]:
    """Train in *out* until *count* updates are made, and return them."""
    ends = start(out, processes, "--out", out, "--optimizer", "asam", "--updates", count, *arguments)
    assert [status for status, _ in ends] == [0] * processes, ends
    return json.loads((out / "result.json").read_text())["updates"]


def checkpoint(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of the only checkpoint in *out*."""
    (folder,) = out.glob("step-*")
    dcp_to_torch_save(folder, out / "whole.pt")
    state = torch.load(out / "whole.pt", weights_only=False)  # made by these tests
    moments = {
        f"{name}.{kind}": value
        for name, kinds in state["optimizer"]["state"].items()
        for kind, value in kinds.items()
    }
    return {**state["model"], **moments, "generator": state["generator"]}


def test_it_learns(tmp_path: Path):
    size = ["--device", "cpu", "--layers", "2", "--width", "64", "--context", "64", "--lr", "3e-3"]
    size += ["--batch-size", "16", "--updates", "60"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "recipes.language_model.train", "--optimizer", "asam", "--out", str(tmp_path), *size]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["processes"], result["options"]["rho"], len(result["updates"])) == (2, 0.2, 60)
    first, last = result["updates"][0], result["updates"][-1]
    assert first["loss"] > 5.5 and last["loss"] < 2.5 and last["validation_loss"] < 2.5
    assert all(each["sharpness"] > 0 for each in result["updates"])
    assert f"update 60: loss {last['loss']:.4f}, sharpness {last['sharpness']:.4f}" in process.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, precision: str):
    options = ("--precision", precision, "--accumulate", 2)
    whole = updates(tmp_path / "whole", 2, 8, *options)
    updates(tmp_path / "stopped", 2, 4, *options)
    partial = tmp_path / "stopped" / "partial"  # as a process leaves it that is killed while it saves
    shutil.copytree(tmp_path / "stopped" / "step-4", partial)
    (partial / ".metadata").unlink()
    stopped = updates(tmp_path / "stopped", 2, 8, *options)
    del stopped[3]["validation_loss"]  # of the checkpoint there
    assert stopped == whole
    expected, found = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped")
    assert expected.keys() == found.keys() and len(expected) > 3 * 20
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not partial.exists()


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory) -> list[dict[str, float]]:
    return updates(tmp_path_factory.mktemp("one"), 1, 6, "--dropout", 0)


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected):
        for name in ("loss", "sharpness", "gradient_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3), name


@pytest.mark.parametrize("before, after", [(2, 1), (2, 4), (1, 2), (4, 2)])
def test_a_checkpoint_goes_on_with_other_processes(tmp_path: Path, of_one_process, before: int, after: int):
    updates(tmp_path, before, 3, "--dropout", 0)
    assert_same(updates(tmp_path, after, 6, "--dropout", 0), of_one_process)


def test_micro_batches_make_the_update_of_the_whole_batch(tmp_path: Path, of_one_process):
    assert_same(updates(tmp_path, 2, 6, "--dropout", 0, "--accumulate", 2), of_one_process)


@pytest.mark.parametrize("optimizer, expected", [("adam", 0), ("sam", 1)])
def test_adam_has_no_sharpness_and_sam_has(tmp_path: Path, of_one_process, optimizer: str, expected: int):
    ((status, _),) = start(
        tmp_path, 1, "--optimizer", optimizer, "--out", tmp_path, "--updates", 2, "--dropout", 0
    )
    assert status == 0
    found = json.loads((tmp_path / "result.json").read_text())["updates"]
    assert [each["sharpness"] > 0 for each in found] == [expected] * 2
    assert found[0]["loss"] == pytest.approx(of_one_process[0]["loss"])
    assert found[0]["sharpness"] != pytest.approx(of_one_process[0]["sharpness"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer", "lion"], "invalid choice: 'lion'"),
        (["--rho", "-1"], "rho is -1.0, but the radius of a region must be a finite number >= 0"),
        (["--optimizer", "adam", "--rho", "1"], "--rho is for --optimizer sam and asam"),
        (["--updates", "0"], "argument --updates: must be at least 1, not 0"),
        (["--lr", "0"], "argument --lr: must be a number above 0, not 0"),
        (["--batch-size", "6", "--accumulate", "4"], "--batch-size must be a multiple of 4, the number of"),
        (["--width", "40"], "--width must be a multiple of 32, not 40"),
        (["--data", "no.txt"], "--data no.txt: there is no such text file"),
        (["--data", os.devnull], "--data /dev/null: there is no such text file"),
        (["--context", "50000"], "1 process(es) with --context 50000 take at least 500010"),
    ],
)
def test_bad_input_is_told_in_a_sentence(tmp_path: Path, arguments: list[str], message: str):
    ((status, output),) = start(tmp_path, 1, "--optimizer", "asam", "--out", tmp_path, *arguments)
    assert status == 2
    *_, last = output.splitlines()
    assert "error: " in last and message in last
    assert not list(tmp_path.glob("step-*"))


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path):
    updates(tmp_path, 2, 1)
    for arguments, message in [
        (["--layers", 3], "step-1 has --layers 2, not 3: choose another --out"),
        ([], "step-1 is damaged: delete it to train anew, or choose another --out"),
    ]:
        if not arguments:
            (tmp_path / "step-1" / "__1_0.distcp").write_bytes(b"")
        for status, output in start(tmp_path, 2, "--optimizer", "sam", "--out", tmp_path, *arguments):
            assert status == 2 and message in output.splitlines()[-1]
