"""Injects faults into runs of fairseq-train with --optimizer asam, and tables those tried and survived.

    python recipes/faults/faults.py [--kills 30] [--seed 1] [--out runs/faults]

A fault is survived if after it every checkpoint file loads and holds the weights and the optimizer's state
that an uninterrupted run had after the same number of updates, and if the run, resumed, ends in the same
state as the uninterrupted one, bit for bit. Writes OUT/faults.json and OUT/faults.md and prints the table.
The exit status is 1 if a fault was not survived; its runs are then kept in OUT/work.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from injection import PLACES, SIGNALS, Fault, Kind, Place, train
from tqdm import tqdm

from fairseq_asam.files import whole

ROOT = Path(__file__).resolve().parents[2]
SAVE_INTERVAL = 3  # updates: shorter than an epoch, and no divisor of one
MICRO_BATCHES = 2  # to an update
UPDATES_BEFORE_SIGNAL = 5  # at most, in each process: some make a checkpoint and some don't
PASS_SECONDS = 0.02
UPDATE_SECONDS = 0.1  # with what comes between two
HANGING_SECONDS = 120
SIGTERMS = 5

# Reductions are to be the same in every run that is compared bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

# One process imports fairseq; each training process is a fork of it.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["fairseq_cli.train"])


def main() -> int:
    args = arguments()
    work = args.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rng = random.Random(args.seed)
    signals = [
        *(signal_at_random(rng, Kind.KILL, i) for i in range(args.kills)),
        *(signal_at_random(rng, Kind.TERMINATE, i) for i in range(SIGTERMS)),
    ]
    rng.shuffle(signals)
    others = other_faults(rng)
    with tqdm(total=len(signals) + len(others) + 3, desc="faults", unit="fault") as bar:
        faults = FaultTrials(work, bar)
        faults.suffer(signals)
        for fault in others:
            faults.suffer([fault])
        briefly = Fault(Kind.BRIEFLY_FULL_DISK, Place.WRITING, rng.randint(3, 9), rng.uniform(0.3, 0.9))
        faults.run_through(briefly, faults.uninterrupted)
        # in the first epoch, all of whose updates but the last have MICRO_BATCHES micro-batches
        faults.run_out_of_memory(visit=rng.randint(20, 40))
    results = {
        "seed": args.seed,
        "updates": faults.last_update,
        "rows": rows(faults.trials),
        "trials": [vars(trial) for trial in faults.trials],
    }
    table = as_markdown(results)
    for name, text in (("faults.json", json.dumps(results, indent=2) + "\n"), ("faults.md", table)):
        with whole(args.out / name) as file:
            file.write_text(text, "utf-8")
    print(table, end="")
    if any(trial.failures for trial in faults.trials):
        return 1
    shutil.rmtree(work)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Inject faults into training runs, and see which they survive."
    )
    parser.add_argument("--kills", type=int, default=30, help="how often to kill -9 (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="decides where the faults strike (default: 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "faults", help="default: runs/faults")
    args = parser.parse_args()
    if args.kills < 0:
        parser.exit(2, f"faults.py: --kills is {args.kills}, but it must be 0 or more.\n")
    if args.out.exists() and not args.out.is_dir():
        parser.exit(2, f"faults.py: --out '{args.out}' is a file: name a folder.\n")
    return args


def signal_at_random(rng: random.Random, kind: Kind, number: int) -> Fault:
    """Return a signal; of any eight with consecutive numbers, half strike in a place of their own each, half
    at any moment."""
    places = [Place.PERTURBED, Place.WRITING, Place.AT_W, Place.COPYING, None, None, None, None]
    place = places[number % len(places)]
    most = UPDATES_BEFORE_SIGNAL
    if place in (Place.AT_W, Place.PERTURBED):
        most *= MICRO_BATCHES
    elif place is not None:
        most //= 2
    return Fault(kind, place, rng.randint(1, most), rng.random())


def other_faults(rng: random.Random) -> list[Fault]:
    """Return the faults that fairseq answers by ending the run."""
    passes = itertools.product((Kind.EXCEPTION, Kind.NAN), (Place.AT_W, Place.PERTURBED))
    files = (Place.WRITING, Place.COPYING)
    return [
        *(Fault(kind, place, rng.randint(20, 80)) for kind, place in passes),
        *(Fault(Kind.FULL_DISK, place, rng.randint(3, 9), rng.uniform(0.3, 0.9)) for place in files),
    ]


@dataclass
class Trial:
    """A fault, where the process really was, and why the fault wasn't survived, if so."""

    fault: str
    place: str
    failures: list[str] = field(default_factory=list)


class End(NamedTuple):
    """How a process ended: its exit status, minus a signal's number, None if it hung; where it was; and
    whether the fault had struck."""

    status: int | None
    place: Place
    struck: bool


class State(NamedTuple):
    """The digest of what a checkpoint holds."""

    updates: int
    weights: str
    optimizer: str


class Training:
    """A training run in a folder of its own, in as many processes as it takes."""

    def __init__(self, folder: Path, data: Path, *flags: str):
        self.folder = folder
        self.processes = 0
        sizes = {"layers": 1, "embed-dim": 32, "ffn-embed-dim": 64, "attention-heads": 2}
        self.arguments = [
            *(str(data), "--save-dir", str(folder), "--user-dir", str(ROOT / "fairseq_asam")),
            *("--optimizer", "asam", "--arch", "transformer", "--share-all-embeddings", "--dropout", "0.2"),
            *(f"--{part}-{size}={n}" for part in ("encoder", "decoder") for size, n in sizes.items()),
            *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
            *("--lr", "5e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "20"),
            *("--cpu", "--seed", "3", "--num-workers", "0", "--no-progress-bar", "--max-epoch", "3"),
            *("--max-tokens", "500", "--update-freq", str(MICRO_BATCHES)),
            *("--required-batch-size-multiple", "1", "--save-interval-updates", str(SAVE_INTERVAL)),
            *flags,
        ]

    def run(self, fault: Fault | None = None) -> End:
        """Start or resume, meet the fault, and return how that ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes += 1
        log = self.folder / f"process-{self.processes}.log"
        here, there = _processes.Pipe()
        place = _processes.Value("i", PLACES.index(Place.BETWEEN), lock=False)
        process = _processes.Process(
            target=train, args=(self.arguments, log, fault, there, place), daemon=True
        )
        process.start()
        there.close()
        hangs = not here.poll(HANGING_SECONDS)
        struck = not hangs and told(here)
        if struck and fault.kind in SIGNALS:
            time.sleep(fault.fraction * (UPDATE_SECONDS if fault.place is None else PASS_SECONDS))
            process.kill() if fault.kind is Kind.KILL else process.terminate()
        process.join(0 if hangs else HANGING_SECONDS)
        status = process.exitcode
        process.kill()
        process.join()
        return End(status, PLACES[place.value], struck)

    def last_words(self) -> str:
        """Return the last line that the last process printed."""
        log = self.folder / f"process-{self.processes}.log"
        return (log.read_text("utf-8", errors="replace").strip().splitlines() or ["nothing"])[-1]

    def states(self) -> tuple[dict[str, State], list[str]]:
        """Return the states in the checkpoints, by file name, and a sentence for each that doesn't load."""
        states, failures = {}, []
        for path in sorted(self.folder.glob("*.pt")):
            try:
                states[path.name] = state_in(path)
            except Exception as error:  # torch raises whatever the broken bytes lead it to
                failures.append(f"{path.name} does not load: {error}")
        return states, failures


def told(connection) -> bool:
    """Whether the other end has said something, rather than ended."""
    try:
        connection.recv()
    except EOFError:
        return False
    return True


class FaultTrials:
    """The uninterrupted run, and the trials held against it."""

    def __init__(self, work: Path, bar: tqdm):
        self.work, self.bar = work, bar
        self.trials: list[Trial] = []
        self.runs = itertools.count(1)
        self.data = work / "corpus" / "bin"
        command = [sys.executable, "-m", "data_prep.generated", str(self.data.parent), "--pairs", "1000"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        self.uninterrupted = self.every_state(None)
        self.last_update = max(self.uninterrupted)

    def training(self, *flags: str) -> Training:
        return Training(self.work / f"run-{next(self.runs)}", self.data, *flags)

    def every_state(self, fault: Fault | None) -> dict[int, State]:
        """Return the state after each update of a run that ends by itself."""
        training = self.training("--save-interval-updates", "1")
        end = training.run(fault)
        if end.status != 0 or end.struck != (fault is not None):
            sys.exit(f"faults.py: training failed even without a fault: {training.last_words()}")
        states, failures = training.states()
        if failures:
            sys.exit(f"faults.py: without a fault, {failures[0]}.")
        shutil.rmtree(training.folder)
        return {state.updates: state for state in states.values()}

    def suffer(self, faults: list[Fault]) -> None:
        """Train until every fault has been met, resuming after each; begin anew when a run has ended."""
        waiting = deque(faults)
        while waiting:
            training, suffered = self.training(), []
            while waiting:
                end = training.run(waiting[0])
                if end.status == 0:
                    break
                fault = waiting.popleft()
                suffered.append(self.judge(fault, end, training))
                if suffered[-1].failures:
                    break
            if not suffered:
                fault = waiting.popleft()
                place = fault.place or Place.BETWEEN
                self.add(Trial(fault.kind.value, place.value, ["the run went to its end without it"]))
            elif not suffered[-1].failures:
                failures = self.compare_end(training, self.uninterrupted)
                for trial in suffered:
                    trial.failures += failures
            self.clean_up(training, suffered)

    def judge(self, fault: Fault, end: End, training: Training) -> Trial:
        """Return how the checkpoints came through a fault that ended the process."""
        trial = Trial(fault.kind.value, (fault.place or end.place).value)
        if not end.struck:
            trial.failures.append("the process ended before the fault struck")
        expected = -SIGNALS[fault.kind] if fault.kind in SIGNALS else 1
        if end.status != expected:
            trial.failures.append(f"the process ended with status {end.status}, not {expected}")
        if fault.place not in (None, end.place) and fault.kind in SIGNALS:
            trial.failures.append(f"the signal came in another place: {end.place.value}")
        if fault.kind in (Kind.EXCEPTION, Kind.NAN) and not (training.folder / "crash.pt").exists():
            trial.failures.append("there is no crash.pt")
        trial.failures += self.compare(training, self.uninterrupted)
        return self.add(trial)

    def run_out_of_memory(self, visit: int) -> None:
        """fairseq skips an update for which memory runs out: the run is to be one that never had it, with as
        many updates as an Adam run in the same plight."""
        skipped = self.every_state(Fault(Kind.SKIP, Place.BETWEEN, -(-visit // MICRO_BATCHES)))
        adam = self.training("--optimizer", "adam")
        adam.run(Fault(Kind.OUT_OF_MEMORY, Place.AT_W, visit))
        updates = state_in(adam.folder / "checkpoint_last.pt").updates
        shutil.rmtree(adam.folder)
        for place in (Place.AT_W, Place.PERTURBED):
            trial = self.run_through(Fault(Kind.OUT_OF_MEMORY, place, visit), skipped)
            if updates != max(skipped):
                trial.failures.append(f"the run has {max(skipped)} updates, but with Adam {updates}")

    def run_through(self, fault: Fault, expected: dict[int, State]) -> Trial:
        """Meet a fault that is not to end the run."""
        training = self.training()
        end = training.run(fault)
        trial = Trial(fault.kind.value, fault.place.value)
        if not end.struck:
            trial.failures.append("the run ended before the fault struck")
        if end.status != 0:
            trial.failures.append(f"the process ended with status {end.status}, not 0")
        trial.failures += self.compare_end(training, expected)
        self.clean_up(training, [trial])
        return self.add(trial)

    def compare(self, training: Training, expected: dict[int, State]) -> list[str]:
        """Return a sentence for each checkpoint that is not what it should be."""
        states, failures = training.states()
        for name, state in states.items():
            should_be = expected.get(state.updates)
            if should_be is None:
                failures.append(f"{name} holds {state.updates} updates, of at most {max(expected)}")
            elif state.weights != should_be.weights:
                failures.append(f"{name} holds other weights than the run had at update {state.updates}")
            elif state != should_be:
                failures.append(f"{name} holds another optimizer state than at update {state.updates}")
        return failures

    def compare_end(self, training: Training, expected: dict[int, State]) -> list[str]:
        """Resume the run if need be, and return how its end and checkpoints differ from what is expected."""
        end = training.run()
        if end.status != 0:
            return [f"the run could not be resumed: {training.last_words()}"]
        failures = self.compare(training, expected)
        last = training.states()[0].get("checkpoint_last.pt")
        if last is not None and last.updates != max(expected):
            failures.append(f"the run ended after {last.updates} updates, not {max(expected)}")
        return failures

    def add(self, trial: Trial) -> Trial:
        self.trials.append(trial)
        self.bar.update()
        self.bar.set_postfix(failed=sum(bool(t.failures) for t in self.trials), refresh=False)
        return trial

    def clean_up(self, training: Training, trials: list[Trial]) -> None:
        if not any(trial.failures for trial in trials):
            shutil.rmtree(training.folder)


# fairseq 0.12.2 saves memory that it never initializes, and weights that only its inference uses.
_UNUSED = re.compile(r"_float_tensor$|\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


def state_in(path: Path) -> State:
    """Return the state that a checkpoint of these runs holds."""
    saved = torch.load(path, map_location="cpu", weights_only=False)
    weights = {name: w for name, w in saved["model"].items() if not _UNUSED.search(name)}
    updates = saved["optimizer_history"][-1]["num_updates"]
    return State(updates, digest(weights), digest(saved["last_optimizer_state"]))


def digest(value: Any) -> str:
    """Return a hash of nested dictionaries and lists of tensors and plain values."""
    if isinstance(value, torch.Tensor):
        content = f"{value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        content = "".join(f"{key}:{digest(value[key])}" for key in sorted(value)).encode()
    elif isinstance(value, (list, tuple)):
        content = "".join(map(digest, value)).encode()
    else:
        content = repr(value).encode()
    return hashlib.sha256(content).hexdigest()


def rows(trials: list[Trial]) -> list[dict]:
    """Count trials by fault and place."""
    tried = Counter((trial.fault, trial.place) for trial in trials)
    survived = Counter((trial.fault, trial.place) for trial in trials if not trial.failures)
    kinds, places = [kind.value for kind in Kind], [place.value for place in Place]
    return [
        {"fault": kind, "place": place, "tried": tried[kind, place], "survived": survived[kind, place]}
        for kind, place in itertools.product(kinds, places)
        if tried[kind, place]
    ]


def as_markdown(results: dict) -> str:
    """Return the table, its sums, and what went wrong."""
    lines = ["| fault | where the process was | tried | survived |", "|:--|:--|--:|--:|"]
    for row in results["rows"]:
        lines.append(f"| {row['fault']} | {row['place']} | {row['tried']} | {row['survived']} |")
    tried, survived = (sum(row[key] for row in results["rows"]) for key in ("tried", "survived"))
    lines += [
        f"| **all** | | **{tried}** | **{survived}** |",
        "",
        f"Each run has {results['updates']} updates. Seed {results['seed']}.",
    ]
    failed = [trial for trial in results["trials"] if trial["failures"]]
    if failed:
        lines += ["", "Not survived:", ""]
        lines += [f"- {t['fault']}, {t['place']}: {'; '.join(t['failures'])}." for t in failed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
