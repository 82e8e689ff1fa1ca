"""Injects faults into runs of fairseq-train with --optimizer asam, and tables those tried and survived.

    python -m recipes.faults.faults [--kills 30] [--workers 1] [--seed 1] [--out runs/faults]

A fault is survived if after it every checkpoint file loads and holds the weights and the optimizer's state
that an uninterrupted run had after the same number of updates, and if the run, resumed, ends in the same
state as the uninterrupted one, bit for bit. With two workers, one that a fault leaves alone must not wait
for ever for the other, and both must end with the same weights. Writes OUT/faults.json and OUT/faults.md,
with two workers OUT/faults-2-workers.json and .md, and prints the table. The exit status is 1 if a fault was
not survived; its runs are then kept in OUT/work.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fairseq_asam.files import write_json
from recipes.faults.injection import DUMMIES, FILES, PASSES, PLACES, SIGNALS, Fault, Kind, Place, train
from recipes.reporter import write_text

ROOT = Path(__file__).resolve().parents[2]
SAVE_INTERVAL = 3  # updates: shorter than an epoch, and no divisor of one
MICRO_BATCHES = 2  # to an update
UPDATES_BEFORE_SIGNAL = 5  # at most, in each process: some make a checkpoint and some don't
PASS_SECONDS = 0.02
UPDATE_SECONDS = 0.1  # with what comes between two
HANGING_SECONDS = 300
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
    signals = signals_at_random(rng, args.kills, args.workers)
    ending = ending_faults(rng, args.workers)
    passing = passing_faults(rng, args.workers)
    exhausting = exhausting_faults(rng, args.workers)
    total = len(signals) + len(ending) + len(passing) + len(PASSES) * len(exhausting)
    with tqdm(total=total, desc="faults", unit="fault") as bar:
        faults = FaultTrials(work, args.workers, bar)
        faults.suffer(signals)
        for fault in ending:
            faults.suffer([fault])
        for fault in passing:
            faults.run_through(fault)
        for fault in exhausting:
            faults.run_out_of_memory(fault)
    results = {
        "workers": args.workers,
        "seed": args.seed,
        "updates": faults.last_update,
        "rows": rows(faults.trials),
        "trials": [vars(trial) for trial in faults.trials],
    }
    table = as_markdown(results)
    name = "faults" if args.workers == 1 else f"faults-{args.workers}-workers"
    write_json(args.out / f"{name}.json", results)
    write_text(args.out / f"{name}.md", table)
    print(table, end="")
    if any(trial.failures for trial in faults.trials):
        return 1
    shutil.rmtree(work)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Inject faults into training runs, and see which they survive."
    )
    parser.add_argument("--kills", type=int, default=30, help="number of kills (default: 30)")
    parser.add_argument("--workers", type=int, default=1, help="number of workers, 1 or 2 (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="decides where the faults strike (default: 1)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "faults",
        help="folder of the table (default: runs/faults)",
    )
    args = parser.parse_args()
    if args.kills < 0:
        parser.exit(2, f"faults.py: --kills is {args.kills}, but it must be 0 or more.\n")
    if args.workers not in (1, 2):
        parser.exit(2, f"faults.py: --workers is {args.workers}, but it must be 1 or 2.\n")
    if args.out.exists() and not args.out.is_dir():
        parser.exit(2, f"faults.py: --out '{args.out}' is a file: name a folder.\n")
    return args


def signals_at_random(rng: random.Random, kills: int, workers: int) -> list[Fault]:
    """Return the signals, in random order: with two workers to one of them or to both, and some more of them
    while one is without a batch."""
    hit = [(0,)] if workers == 1 else [(0,), (1,), (0, 1)]
    numbers = [(Kind.KILL, i) for i in range(kills)]
    numbers += [(Kind.TERMINATE, i) for i in range(SIGTERMS * len(hit))]
    signals = [signal_at_random(rng, kind, i, hit[i % len(hit)]) for kind, i in numbers]
    if workers > 1:
        dummies = itertools.product(DUMMIES, hit)
        signals += [Fault(Kind.KILL, place, 1, rng.random(), of) for place, of in dummies]
    rng.shuffle(signals)
    return signals


def signal_at_random(rng: random.Random, kind: Kind, number: int, workers: tuple[int, ...]) -> Fault:
    """Return a signal; of any eight with consecutive numbers, half strike in a place of their own each, half
    at any moment."""
    places = [Place.PERTURBED, Place.WRITING, Place.AT_W, Place.COPYING, None, None, None, None]
    place = places[number % len(places)]
    most = UPDATES_BEFORE_SIGNAL
    if place in PASSES:
        most *= MICRO_BATCHES
    elif place is not None:
        most //= 2
    return Fault(kind, place, rng.randint(1, most), rng.random(), workers)


def ending_faults(rng: random.Random, workers: int) -> list[Fault]:
    """Return the faults that fairseq answers by ending the run."""
    passes = itertools.product((Kind.EXCEPTION, Kind.NAN), PASSES, range(workers))
    return [
        *(Fault(kind, place, rng.randint(20, 80) // workers, workers=(w,)) for kind, place, w in passes),
        *(Fault(Kind.FULL_DISK, place, rng.randint(3, 9), rng.uniform(0.3, 0.9)) for place in FILES),
    ]


def passing_faults(rng: random.Random, workers: int) -> list[Fault]:
    """Return the faults after which the run is to go on as without them."""
    dummies = DUMMIES if workers > 1 else ()
    return [
        Fault(Kind.BRIEFLY_FULL_DISK, Place.WRITING, rng.randint(3, 9), rng.uniform(0.3, 0.9)),
        *(Fault(Kind.OTHER_DUMMY, place, rng.randint(1, 3), workers=(1,)) for place in dummies),
    ]


def exhausting_faults(rng: random.Random, workers: int) -> list[Fault]:
    """Return two faults of memory for each worker: in the first micro-batch of an update, and in the last.

    They come early in the first epoch, whose last update has a single micro-batch: there fairseq itself
    fails if one of two workers runs out of memory."""
    return [
        Fault(
            Kind.OUT_OF_MEMORY,
            Place.AT_W,
            MICRO_BATCHES * rng.randint(10 // workers, 20 // workers - 1) + micro_batch,
            rng.random(),
            workers=(worker,),
        )
        for worker in range(workers)
        for micro_batch in (1, MICRO_BATCHES)
    ]


@dataclass
class Trial:
    """A fault, the workers that it hit, where the watched worker really was, and what shows that the fault
    wasn't survived."""

    fault: str
    workers: list[int]
    place: str
    failures: list[str] = field(default_factory=list)


class End(NamedTuple):
    """How a run ended: the exit status of each worker, minus a signal's number, None if it hung; where the
    watched worker was; and whether all faults had struck."""

    statuses: list[int | None]
    place: Place
    struck: bool

    @property
    def well(self) -> bool:
        return all(status == 0 for status in self.statuses)


class State(NamedTuple):
    """The digest of what a checkpoint holds."""

    updates: int
    weights: str
    optimizer: str


class Worker:
    """A process of a run."""

    def __init__(self, arguments: list[str], log: Path, faults: list[Fault]):
        self.connection, there = _processes.Pipe()
        self._place = _processes.Value("i", PLACES.index(Place.BETWEEN), lock=False)
        args = (arguments, log, faults, there, self._place)
        self.process = _processes.Process(target=train, args=args, daemon=True)
        self.process.start()
        there.close()

    @property
    def place(self) -> Place:
        return PLACES[self._place.value]

    def is_struck(self) -> bool:
        """Wait for the next fault, and return whether it struck before the worker ended or hung."""
        try:
            return self.connection.poll(HANGING_SECONDS) and self.connection.recv() is None
        except EOFError:
            return False

    def end(self) -> int | None:
        """Wait for the worker to end by itself, and return its exit status, None if it hangs."""
        self.process.join(HANGING_SECONDS)
        status = self.process.exitcode
        self.process.kill()
        self.process.join()
        return status


class Training:
    """A training run in a folder of its own, begun and resumed as often as it takes."""

    def __init__(self, folder: Path, data: Path, *flags: str, workers: int = 1):
        self.folder = folder
        self.workers = workers
        self.logs: list[Path] = []
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
        if workers > 1:
            self.arguments += ["--distributed-world-size", str(workers), "--distributed-no-spawn"]
            self.arguments += ["--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]

    def run(self, *faults: Fault) -> End:
        """Start or resume, meet the faults, and return how that ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(self.logs) // self.workers + 1
        address = f"tcp://127.0.0.1:{free_port()}"
        workers = []
        for rank in range(self.workers):
            self.logs.append(self.folder / f"process-{number}-{rank}.log")
            own = ["--distributed-rank", str(rank), "--distributed-init-method", address]
            arguments = self.arguments + (own if self.workers > 1 else [])
            watching = [fault for fault in faults if fault.watched == rank]
            workers.append(Worker(arguments, self.logs[-1], watching))
        struck, place = True, Place.BETWEEN
        for fault in faults:
            watched = workers[fault.watched]
            struck = struck and watched.is_struck()
            if struck and fault.kind in SIGNALS:
                time.sleep(fault.fraction * (UPDATE_SECONDS if fault.place is None else PASS_SECONDS))
                hit = [workers[rank].process for rank in fault.workers]
                for process in hit:
                    process.kill() if fault.kind is Kind.KILL else process.terminate()
                for process in hit:
                    process.join(HANGING_SECONDS)
            place = watched.place
        for worker in workers:
            worker.connection.close()
        return End([worker.end() for worker in workers], place, struck)

    def failures(self, end: End, expected: list[set[int]]) -> list[str]:
        """Return a sentence for each worker that ended with another status than is expected."""
        failures = [] if end.struck else ["the run ended before the fault struck"]
        for worker, (status, should_be) in enumerate(zip(end.statuses, expected)):
            log = self.logs[worker - self.workers].read_text("utf-8", errors="replace")
            last_words = (log.strip().splitlines() or ["nothing"])[-1]
            if status is None:
                failures.append(f"worker {worker} waited for ever: {last_words}")
            elif status not in should_be:
                allowed = " or ".join(map(str, sorted(should_be)))
                failures.append(f"worker {worker} ended with status {status}, not {allowed}: {last_words}")
        return failures

    def updates(self) -> int:
        """Return how many updates the last checkpoint holds."""
        last = self.states()[0].get("checkpoint_last.pt")
        return 0 if last is None else last.updates

    def states(self) -> tuple[dict[str, State], list[str]]:
        """Return the states in the checkpoints, by file name, and a sentence for each that doesn't load."""
        states, failures = {}, []
        for path in sorted(self.folder.glob("*.pt")):
            try:
                states[path.name] = state_in(path)
            except Exception as error:  # torch raises whatever the broken bytes lead it to
                failures.append(f"{path.name} does not load: {error}")
        return states, failures


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class FaultTrials:
    """The uninterrupted run, and the trials held against it."""

    def __init__(self, work: Path, workers: int, bar: tqdm):
        self.work, self.workers, self.bar = work, workers, bar
        self.trials: list[Trial] = []
        self.runs = itertools.count(1)
        self.data = work / "corpus" / "bin"
        command = [sys.executable, "-m", "data_prep.generated", str(self.data.parent), "--pairs", "1000"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            # after each update, as crash.pt may hold any
            self.uninterrupted = self.states_of_run(save_interval=1)
        except RuntimeError as error:
            sys.exit(f"faults.py: without a fault, {error}.")
        self.last_update = max(self.uninterrupted)

    def training(self, *flags: str) -> Training:
        return Training(self.work / f"run-{next(self.runs)}", self.data, *flags, workers=self.workers)

    def states_of_run(self, *faults: Fault, save_interval: int = SAVE_INTERVAL) -> dict[int, State]:
        """Return the states, by update, in the checkpoints of a run that is to end by itself.

        Raises:
            RuntimeError: it did not, or left checkpoints that cannot be loaded.
        """
        training = self.training("--save-interval-updates", str(save_interval))
        failures = training.failures(training.run(*faults), [{0}] * self.workers)
        states, broken = training.states()
        if failures + broken:
            raise RuntimeError("; ".join(failures + broken))
        shutil.rmtree(training.folder)
        return {state.updates: state for state in states.values()}

    def suffer(self, faults: list[Fault]) -> None:
        """Train until every fault has been met, resuming after each; begin anew when a run has ended."""
        waiting = deque(faults)
        while waiting:
            training, suffered = self.training(), []
            while waiting:
                end = training.run(waiting[0])
                if end.well:
                    break
                fault = waiting.popleft()
                failures = self.judge(fault, end, training, self.uninterrupted)
                suffered.append(self.add(fault, failures, end.place))
                if failures:
                    break
            if not suffered:
                self.add(waiting.popleft(), ["the run went to its end without it"])
            elif not suffered[-1].failures:
                failures = self.compare_end(training, self.uninterrupted)
                for trial in suffered:
                    trial.failures += failures
            self.clean_up(training, suffered)

    def judge(self, fault: Fault, end: End, training: Training, expected: dict[int, State]) -> list[str]:
        """Return what is wrong with the workers and checkpoints after a fault that ended the run."""
        # A worker that is left alone needs no other when training is over.
        statuses = [{0, 1} if training.updates() == max(expected) else {1} for _ in end.statuses]
        for worker in fault.workers:
            statuses[worker] = {-SIGNALS[fault.kind] if fault.kind in SIGNALS else 1}
        failures = training.failures(end, statuses)
        if fault.place not in (None, end.place) and fault.kind in SIGNALS:
            failures.append(f"the signal came in another place: {end.place.value}")
        # fairseq has worker 0 alone write it, and of an exception another worker tells it nothing.
        crashes = fault.kind is Kind.NAN or (fault.kind is Kind.EXCEPTION and fault.workers == (0,))
        if crashes and not (training.folder / "crash.pt").exists():
            failures.append("there is no crash.pt")
        return failures + self.compare(training, expected)

    def run_through(self, fault: Fault) -> None:
        """Meet a fault that is to leave no trace."""
        training = self.training()
        failures = training.failures(training.run(fault), [{0}] * self.workers)
        failures += self.compare_end(training, self.uninterrupted)
        self.clean_up(training, [self.add(fault, failures)])

    def run_out_of_memory(self, fault: Fault) -> None:
        """Meet a fault of memory in either pass, be killed some updates later, and resume.

        fairseq leaves out an update for which memory runs out; with two workers it goes on with what the
        other one has found. The run is to be one without the update, or one that is not killed afterwards,
        and to have as many updates as an Adam run in the same plight."""
        adam = self.training("--optimizer", "adam")
        adam.run(fault)
        update = -(-fault.visit // MICRO_BATCHES)
        everyone = tuple(range(self.workers))
        kill = Fault(Kind.KILL, None, update + SAVE_INTERVAL + 1, fault.fraction, everyone)
        for place in PASSES:
            fault = replace(fault, place=place)
            training = self.training()
            try:
                skip = Fault(Kind.SKIP, Place.BETWEEN, update)
                expected = self.states_of_run(skip if self.workers == 1 else fault)
            except RuntimeError as error:
                failures = [str(error)]
            else:
                end = training.run(fault, kill)
                failures = self.judge(kill, end, training, expected) + self.compare_end(training, expected)
                if adam.updates() != max(expected):
                    failures.append(f"the run has {max(expected)} updates, but with Adam {adam.updates()}")
            self.clean_up(training, [self.add(fault, failures)])
        shutil.rmtree(adam.folder)

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
        failures = training.failures(training.run(), [{0}] * self.workers)
        if failures:
            return [f"resumed, {failure}" for failure in failures]
        failures = self.compare(training, expected)
        if training.updates() != max(expected):
            failures.append(f"the run ended after {training.updates()} updates, not {max(expected)}")
        return failures

    def add(self, fault: Fault, failures: list[str], place: Place = Place.BETWEEN) -> Trial:
        place = fault.place or place
        self.trials.append(Trial(fault.kind.value, list(fault.workers), place.value, failures))
        self.bar.update()
        self.bar.set_postfix(failed=sum(bool(t.failures) for t in self.trials), refresh=False)
        return self.trials[-1]

    def clean_up(self, training: Training, trials: list[Trial]) -> None:
        if not any(trial.failures for trial in trials):
            shutil.rmtree(training.folder)


# fairseq 0.12.2 saves memory that it never initializes, and weights that only its inference uses.
_UNUSED = re.compile(r"_float_tensor$|\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$")


def state_in(path: Path) -> State:
    """Return the state that a checkpoint of these runs holds."""
    # Importing fairseq takes seconds and talks.
    import fairseq_asam.tasks.checkpoints  # noqa: F401  tells torch what a checkpoint may hold

    saved = torch.load(path, map_location="cpu")
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
    """Count trials by fault, workers hit, and place."""
    kinds, places = [kind.value for kind in Kind], [place.value for place in Place]
    tried, survived = Counter(), Counter()
    for trial in trials:
        key = (kinds.index(trial.fault), tuple(trial.workers), places.index(trial.place))
        tried[key] += 1
        survived[key] += not trial.failures
    return [
        {
            "fault": kinds[kind],
            "workers": list(workers),
            "place": places[place],
            "tried": tried[kind, workers, place],
            "survived": survived[kind, workers, place],
        }
        for kind, workers, place in sorted(tried)
    ]


def as_markdown(results: dict) -> str:
    """Return the table, its sums, and what went wrong."""
    lines = ["| fault | worker hit | where it was | tried | survived |", "|:--|:--|:--|--:|--:|"]
    for row in results["rows"]:
        hit = " and ".join(map(str, row["workers"]))
        lines.append(f"| {row['fault']} | {hit} | {row['place']} | {row['tried']} | {row['survived']} |")
    tried, survived = (sum(row[key] for row in results["rows"]) for key in ("tried", "survived"))
    workers = "1 worker" if results["workers"] == 1 else f"{results['workers']} workers"
    lines += [
        f"| **all** | | | **{tried}** | **{survived}** |",
        "",
        f"Each run has {workers} and {results['updates']} updates. Seed {results['seed']}.",
    ]
    failed = [trial for trial in results["trials"] if trial["failures"]]
    if failed:
        lines += ["", "Not survived:", ""]
        lines += [f"- {t['fault']} {t['workers']}, {t['place']}: {'; '.join(t['failures'])}." for t in failed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
