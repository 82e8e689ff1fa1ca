"""The real fairseq commands, and what tests ask of their checkpoints."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fairseq
import torch

from tests.processes import forkserver

ROOT = Path(__file__).parent.parent
PLUGIN = ["--user-dir", str(ROOT / "fairseq_asam")]

# Reductions are to be the same in every run that is compared bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@dataclass
class Result:
    """How a command ended: its exit status, and what it printed on both streams together."""

    status: int
    output: str


def _write_to(stdout: Path, stderr: Path) -> None:
    for descriptor, file in enumerate((stdout, stderr), start=1):
        with open(file, "a") as stream:  # both may go to one file
            os.dup2(stream.fileno(), descriptor)


def run_train(arguments: list[str], log: Path) -> None:
    """Run ``fairseq-train`` with *arguments* in this process, its output in *log*."""
    _main("train", arguments, log)


def _main(command: str, arguments: list[str], log: Path) -> None:
    log.unlink(missing_ok=True)
    _write_to(log, log)
    sys.argv = [f"fairseq-{command}", *arguments]
    if command == "train":
        from fairseq_cli.train import cli_main
    else:
        from fairseq_cli.generate import cli_main
    cli_main()


def start(command: str, arguments: list, log: Path):
    """Start ``fairseq-<command>`` with *arguments*, its output in *log*, and return the process.

    It is as if started afresh, but sooner: see ``tests/processes.py``.
    """
    process = forkserver.Process(target=_main, args=(command, [str(a) for a in arguments], log))
    process.start()
    return process


def _run_module(name: str, arguments: list[str], environment: dict[str, str], folder: Path) -> None:
    _write_to(folder / "stdout", folder / "stderr")
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["", *arguments]
    # Those of a new Python: the forkserver and fairseq have set others.
    multiprocessing.set_start_method(None, force=True)
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_module(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Run ``python -m name`` with *arguments* in the root of the repository, sooner (``tests/processes.py``).

    *variables* are added to the environment.
    """
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        process = forkserver.Process(
            target=_run_module, args=(name, words, {**os.environ, **variables}, Path(folder))
        )
        process.start()
        process.join()
        outputs = [Path(folder, stream).read_text("utf-8") for stream in ("stdout", "stderr")]
    return subprocess.CompletedProcess([name, *words], process.exitcode, *outputs)


SIZES = [
    f"--{part}-{size}"
    for part in ("encoder", "decoder")
    for size in ("layers=1", "embed-dim=32", "ffn-embed-dim=64", "attention-heads=2")
]
TRANSFORMER = ["--arch", "transformer", *SIZES, "--share-all-embeddings"]
LABEL_SMOOTHED = ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"]


def recipe(data: Path, save_dir: Path, *flags) -> list:
    """Arguments of fairseq-train for a model, unless *flags* have another, that learns the generated corpus
    in seconds."""
    model = [] if "--arch" in flags else TRANSFORMER
    criterion = [] if "--criterion" in flags or "--tokens-per-sample" in flags else LABEL_SMOOTHED
    return [
        *(data, "--save-dir", save_dir, *model, *criterion, "--cpu", "--seed", "3", "--max-tokens", "800"),
        *("--lr", "5e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "20", "--num-workers", "0"),
        *("--no-epoch-checkpoints", "--no-progress-bar", "--log-format", "json"),
        # fairseq drops a last batch that is not a multiple of this
        *("--required-batch-size-multiple", "1", *flags),
    ]


def generate_corpus(destination: Path) -> Path:
    """Make the generated corpus, prepared: ``bin/`` is what fairseq-preprocess wrote."""
    run_module("data_prep.generated", destination, "--pairs", "1000").check_returncode()
    return destination


#: The Transformers of fairseq 0.12.2 have weights that only its inference uses. With these, torch's
#: DistributedDataParallel fails without --find-unused-parameters, with Adam too.
FOR_INFERENCE_TOO = fairseq.__version__ == "0.12.2"
BACKENDS = ["legacy_ddp"] if FOR_INFERENCE_TOO else ["legacy_ddp", "pytorch_ddp"]
#: fairseq 0.12.2 saves these weights, and memory that it never initializes.
UNUSED = re.compile(r"_float_tensor$|\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


def checkpoint(save_dir: Path, name: str = "checkpoint_last.pt") -> dict:
    """The checkpoint of a run; made by these tests, hence trusted."""
    return torch.load(save_dir / name, weights_only=False)


def assert_same_state(a: dict, b: dict) -> None:
    """Assert that two checkpoints hold, bit for bit, the same weights and optimizer state."""
    assert a["model"].keys() == b["model"].keys()
    names = [name for name in a["model"] if not UNUSED.search(name)]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in names)
    states = [c["last_optimizer_state"]["state"] for c in (a, b)]
    assert states[0].keys() == states[1].keys()
    for parameter, state in states[0].items():
        for key, value in state.items():
            other = states[1][parameter][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other
    updates = [c["optimizer_history"][-1]["num_updates"] for c in (a, b)]
    assert updates[0] == updates[1] > 0


def assert_other_weights(a: dict, b: dict) -> None:
    """Assert that two checkpoints differ in a weight that is used."""
    assert any(
        not torch.equal(w, b["model"][name]) for name, w in a["model"].items() if not UNUSED.search(name)
    )


def trained(folder: Path, data: Path, *flags) -> str:
    """Train for three epochs and return the path of the last checkpoint."""
    arguments = recipe(data, folder, "--max-epoch", "3", *flags)
    process = start("train", arguments, folder.with_suffix(".log"))
    process.join()
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()
    return str(folder / "checkpoint_last.pt")
