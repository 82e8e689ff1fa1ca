"""The language model with weights in shards: it learns, goes on after an interruption, refuses bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytest.importorskip("torch", minversion="2.6", reason="fully_shard is public from torch 2.6 on")

from recipes.language_model.train import main
from tests.commands import ROOT
from tests.processes import started

# One worker of pytest-xdist makes the run that all of them use.
pytestmark = pytest.mark.xdist_group("language_model")

TINY = [
    *("--device", "cpu", "--layers", "2", "--width", "32", "--context", "16", "--batch-size", "8"),
    *("--lr", "5e-3", "--save-every", "100", "--optimizer", "asam", "--data", str(ROOT / "LICENSE")),
]
#: The exit status of a command, and what it printed.
End = tuple[int, str]


def run(rank: int, processes: int, port: int, commands: list[list[str]], stores: Path) -> list[End]:
    """Run train.py with each of *commands* in this process, one of several. Return how each ended."""
    of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    ends = []
    for number, command in enumerate(commands):
        output, status = io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            for name, value in of_torchrun.items():
                patch.setenv(name, str(value))
            # A port, as torchrun gives it, could not be used by the next command again.
            store = f"file://{stores}/{processes}-{number}"
            dist.init_process_group("gloo", store, rank=rank, world_size=processes)
            try:
                with contextlib.redirect_stderr(output):
                    main([*TINY, *command])
            except SystemExit as end:
                status = end.code
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        ends.append((status, output.getvalue()))
    return ends


def start(processes: int, tmp_path: Path, *commands: list) -> list[list[End]]:
    """Start *processes* processes that run *commands* one after the other. Return how each command ended in
    each process. One process is this one."""
    commands = [[str(word) for word in command] for command in commands]
    tmp_path.mkdir()
    if processes == 1:
        return [[end] for end in run(0, 1, 0, commands, tmp_path)]
    return [list(ends) for ends in zip(*started(processes, run, commands, tmp_path))]


def updates_of(out: Path) -> list[dict[str, float]]:
    return json.loads((out / "result.json").read_text())["updates"]


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
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


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, list[End]]:
    """How every command ended that takes several processes. Few starts make them all."""
    folder = tmp_path_factory.mktemp("runs")
    made = {"folder": folder}

    def make(processes: int, **commands: list) -> None:
        commands = {name: ["--out", folder / name.split("_")[0], *words] for name, words in commands.items()}
        ends = start(processes, folder / f"stores-{len(made)}", *commands.values())
        made.update(zip(commands, ends))

    def until(updates: int, *options) -> list:
        return ["--updates", updates, *options]

    half, exact = ("--accumulate", 2), ("--dropout", 0)
    make(
        2,
        fp32=until(6, *half),
        bf16=until(6, *half, "--precision", "bf16"),
        stoppedfp32=until(3, *half),
        stoppedbf16=until(3, *half, "--precision", "bf16"),
        accumulated=until(6, *half, *exact),
        chain=until(2, *exact),
        damaged=until(1),
    )
    for precision in ("fp32", "bf16"):
        checkpoint = folder / f"stopped{precision}" / "step-3"
        partial = shutil.copytree(checkpoint, checkpoint.with_name("partial"))
        (partial / ".metadata").unlink()  # as a process leaves it that is killed while it saves
    make(4, chain_4=until(4, *exact))
    make(1, chain_1=until(6, *exact), one=until(8, *exact))
    (folder / "damaged" / "step-1" / "__1_0.distcp").write_bytes(b"")
    make(
        2,
        stoppedfp32_2=until(6, *half),
        stoppedbf16_2=until(6, *half, "--precision", "bf16"),
        chain_2=until(8, *exact),
        damaged_layers=until(2, "--layers", 3),
        damaged_2=until(2),
    )
    return made


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected):
        for name in ("loss", "sharpness", "gradient_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3), name


def test_the_readme_s_command_trains(tmp_path: Path):
    size = ["--layers", "1", "--width", "32", "--context", "16", "--updates", "3", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "recipes.language_model.train", "--optimizer", "asam", "--out", str(tmp_path), *size]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["processes"], result["options"]["rho"], len(result["updates"])) == (2, 0.2, 3)
    last = result["updates"][-1]
    assert f"update 3: loss {last['loss']:.4f}, sharpness {last['sharpness']:.4f}" in process.stdout


def test_it_learns(tmp_path: Path):
    out = tmp_path / "run"
    [[(status, output)]] = start(1, tmp_path / "stores", ["--out", out, "--updates", 90])
    assert status == 0, output
    updates = updates_of(out)
    assert updates[0]["loss"] > 5.5 and updates[-1]["loss"] < 3.5 and updates[-1]["validation_loss"] < 3.5
    assert all(each["sharpness"] > 0 for each in updates)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(made, precision: str):
    names = (precision, f"stopped{precision}", f"stopped{precision}_2")
    assert [status for name in names for status, _ in made[name]] == [0] * 6
    whole, stopped = made["folder"] / precision, made["folder"] / f"stopped{precision}"
    found = updates_of(stopped)
    del found[2]["validation_loss"]  # of the checkpoint there
    assert found == updates_of(whole)
    expected, found = tensors_of(whole), tensors_of(stopped)
    assert expected.keys() == found.keys() and len(expected) > 3 * 20
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not (stopped / "partial").exists()


def test_a_checkpoint_goes_on_with_other_processes(made):
    """Two, then four, one, and two again."""
    for name, processes in (("chain", 2), ("chain_4", 4), ("chain_1", 1), ("chain_2", 2)):
        assert [status for status, _ in made[name]] == [0] * processes, made[name]
    assert_same(updates_of(made["folder"] / "chain"), updates_of(made["folder"] / "one"))


def test_micro_batches_make_the_update_of_the_whole_batch(made):
    assert_same(updates_of(made["folder"] / "accumulated"), updates_of(made["folder"] / "one")[:6])


@pytest.mark.parametrize("optimizer, expected", [("adam", 0), ("sam", 1)])
def test_adam_has_no_sharpness_and_sam_has(made, tmp_path: Path, optimizer: str, expected: int):
    out, asam = tmp_path / "run", updates_of(made["folder"] / "one")
    command = ["--optimizer", optimizer, "--out", out, "--updates", 2, "--dropout", 0]
    [[(status, output)]] = start(1, tmp_path / "stores", command)
    assert status == 0, output
    found = updates_of(out)
    assert [each["sharpness"] > 0 for each in found] == [expected] * 2
    assert found[0]["loss"] == pytest.approx(asam[0]["loss"])
    assert found[0]["sharpness"] != pytest.approx(asam[0]["sharpness"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer", "lion"], "invalid choice: 'lion'"),
        (["--rho", "-1"], "rho is -1.0, but the radius of a region must be a finite number >= 0"),
        (["--optimizer", "adam", "--rho", "1"], "--rho is for --optimizer sam and asam"),
        (["--updates", "0"], "argument --updates: must be a whole number from 1, not 0"),
        (["--lr", "0"], "argument --lr: must be a number above 0, not 0"),
        (["--batch-size", "6", "--accumulate", "4"], "--batch-size must be a multiple of 4, the number of"),
        (["--width", "40"], "--width must be a multiple of 32, not 40"),
        (["--data", "no.txt"], "--data no.txt: there is no such text file"),
        (["--data", os.devnull], "--data /dev/null: there is no such text file"),
        (["--context", "50000"], "1 process(es) with --context 50000 take at least 500010"),
    ],
)
def test_bad_input_is_told_in_a_sentence(tmp_path: Path, arguments: list[str], message: str):
    out = tmp_path / "run"
    [[(status, output)]] = start(1, tmp_path / "stores", ["--out", out, *arguments])
    assert status == 2
    *_, last = output.splitlines()
    assert "error: " in last and message in last
    assert not out.exists()


@pytest.mark.parametrize(
    "command, message",
    [
        ("damaged_layers", "step-1 has --layers 2, not 3: choose another --out"),
        ("damaged_2", "step-1 is damaged: delete it to train anew, or choose another --out"),
    ],
)
def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(made, command: str, message: str):
    assert len(made[command]) == 2
    for status, output in made[command]:
        assert status == 2 and message in output.splitlines()[-1]
