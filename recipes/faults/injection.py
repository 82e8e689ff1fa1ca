"""Runs fairseq-train in a process in which something goes wrong at an exact place.

The plugin knows nothing of this: what is wrapped here is wrapped from outside, in that process alone.
"""

from __future__ import annotations

import enum
import io
import math
import os
import resource
import shutil
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class Kind(enum.Enum):
    """What goes wrong, by the name that the table gives it."""

    KILL = "kill -9"
    TERMINATE = "SIGTERM"
    EXCEPTION = "exception in the criterion"
    OUT_OF_MEMORY = "out of memory"
    NAN = "NaN loss"
    FULL_DISK = "full disk"
    BRIEFLY_FULL_DISK = "full disk, for a second"
    OTHER_DUMMY = "other dummy batch"  # fairseq gives one to a worker that has run out of batches
    SKIP = "skipped update"  # no fault: what running out of memory is to come to


SIGNALS = {Kind.KILL: signal.SIGKILL, Kind.TERMINATE: signal.SIGTERM}


class Place(enum.Enum):
    """Where a worker is. BETWEEN these are start-up, reading data, optimizer steps and validation."""

    BETWEEN = "elsewhere"
    AT_W = "pass at w"
    PERTURBED = "pass at w + epsilon"
    AT_W_OF_DUMMY = "pass at w, worker 1 without a batch"
    PERTURBED_OF_DUMMY = "pass at w + epsilon, worker 1 without a batch"
    WRITING = "writing a checkpoint"
    COPYING = "copying a checkpoint"


PLACES = list(Place)
PASSES = (Place.AT_W, Place.PERTURBED)
FILES = (Place.WRITING, Place.COPYING)
DUMMIES = (Place.AT_W_OF_DUMMY, Place.PERTURBED_OF_DUMMY)


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong once.

    `place` is None for a signal at any moment after an update has begun. `visit` counts from 1 how often the
    watched worker has come to the place: micro-batches, checkpoint files, or, for SKIP and None, updates.
    `fraction`, from 0 to 1, is how far through the pass or the file it gets. `workers` are those hit.
    """

    kind: Kind
    place: Place | None
    visit: int = 1
    fraction: float = 0.5
    workers: tuple[int, ...] = (0,)

    @property
    def watched(self) -> int:
        """The worker that has to come to the place: fairseq has worker 0 write all checkpoints, and of two
        workers the second runs out of batches."""
        if self.place in FILES:
            return 0
        return 1 if self.place in DUMMIES else self.workers[0]


def train(arguments: list[str], log: Path, faults: list[Fault], parent: Connection, place: Any) -> None:
    """Run fairseq-train with `arguments`, its output in `log`, and meet the faults that watch this worker.

    `place`, a shared integer, is kept at the index in PLACES of where the worker is. `parent` is told when
    a fault strikes. If the fault is a signal, `parent` has to send it and then to hang up, and until it does
    the worker doesn't leave the fault's place.
    """
    # Importing fairseq takes seconds and talks: only where it trains.
    from fairseq.trainer import Trainer
    from fairseq_cli.train import cli_main

    # --user-dir imports nothing where the package is imported already, as by the script that starts this.
    import fairseq_asam.tasks  # noqa: F401

    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["fairseq-train", *arguments]
    initialize, trainers = Trainer.__init__, []

    def initialize_and_inject(trainer, *args, **kwargs):
        initialize(trainer, *args, **kwargs)
        trainers.append(trainer)
        for fault in faults or [None]:
            _Injection(fault, parent, place).install(trainer)

    Trainer.__init__ = initialize_and_inject
    cli_main()
    if torch.distributed.is_initialized():
        compare_with_first_worker(trainers[0].get_model())


def compare_with_first_worker(model: torch.nn.Module) -> None:
    """Raise RuntimeError unless each worker has the same weights, whose checkpoints are the first one's."""
    same = True
    for weight in model.parameters():
        first = weight.detach().clone()
        torch.distributed.broadcast(first, src=0)
        same = same and torch.equal(first, weight)
    if not same:
        raise RuntimeError("this worker has other weights than worker 0")


class _Injection:
    def __init__(self, fault: Fault | None, parent: Connection, place: Any):
        self.fault, self.parent, self.place = fault, parent, place
        self.visits = 0
        self.perturbed = self.dummy = False
        self.signal_is_due = False

    def install(self, trainer: Any) -> None:
        from fairseq import checkpoint_utils

        from fairseq_asam.sharpness import Perturbation

        self.parameters = list(trainer.get_model().parameters())
        criterion = trainer.get_criterion()
        criterion.forward = self.around_criterion(criterion, criterion.forward)
        Perturbation.__enter__ = self.around_enter(Perturbation.__enter__)
        Perturbation.__exit__ = self.around_exit(Perturbation.__exit__)
        trainer.train_step = self.around_update(trainer.train_step)
        trainer._prepare_sample = self.around_prepare(trainer._prepare_sample)
        checkpoint_utils._torch_persistent_save = self.around_save(checkpoint_utils._torch_persistent_save)
        shutil.copyfile = self.around_copy(shutil.copyfile)

    def come_to(self, place: Place) -> Kind | None:
        """Note the place, and return what is to go wrong in it."""
        self.place.value = PLACES.index(place)
        return self.count_visit() if self.fault is not None and self.fault.place is place else None

    def count_visit(self) -> Kind | None:
        self.visits += 1
        return self.fault.kind if self.visits == self.fault.visit else None

    def strike(self) -> None:
        self.parent.send(None)
        self.signal_is_due = self.fault.kind in SIGNALS and self.fault.place is not None

    def leave(self) -> None:
        if self.signal_is_due:
            self.parent.poll(None)  # until it hangs up: it sends nothing but the signal
            self.signal_is_due = False
        self.place.value = PLACES.index(Place.BETWEEN)

    def around_criterion(self, criterion, forward):
        def passing(*args, **kwargs):
            if not criterion.training:
                return forward(*args, **kwargs)
            kind = self.come_to((DUMMIES if self.dummy else PASSES)[self.perturbed])
            if kind is not None:
                self.strike()
            loss, sample_size, logging_output = forward(*args, **kwargs)
            if kind is Kind.EXCEPTION:
                raise ValueError("an injected fault")
            if kind is Kind.OUT_OF_MEMORY:
                raise RuntimeError("out of memory (an injected fault)")
            factor = {Kind.NAN: math.nan, Kind.OTHER_DUMMY: 2.0}.get(kind, 1.0)
            return loss * factor, sample_size, logging_output

        return passing

    def around_enter(self, enter):
        def entering(perturbation):
            self.leave()
            if self.fault is None:
                self.weights = [w.detach().clone() for w in self.parameters]
            entered = enter(perturbation)
            self.perturbed = True
            self.place.value = PLACES.index(Place.PERTURBED)
            return entered

        return entering

    def around_exit(self, exit_):
        def exiting(perturbation, *exception):
            self.leave()
            self.perturbed = False
            left = exit_(perturbation, *exception)
            # Otherwise the run against which all are held would itself have checkpoints of perturbed weights.
            if self.fault is None and not all(map(torch.equal, self.weights, self.parameters)):
                raise RuntimeError("the pass at w + epsilon left other weights behind than it found")
            return left

        return exiting

    def around_update(self, train_step):
        def update(*args, **kwargs):
            if self.come_to(Place.BETWEEN) is Kind.SKIP:
                self.strike()
                return None
            if self.fault is not None and self.fault.place is None and self.count_visit():
                self.strike()
            return train_step(*args, **kwargs)

        return update

    def around_prepare(self, prepare):
        def preparing(*args, **kwargs):
            sample, self.dummy = prepare(*args, **kwargs)
            return sample, self.dummy

        return preparing

    def around_save(self, save):
        def saving(state, file):
            kind = self.come_to(Place.WRITING)
            if kind is not None:
                whole = io.BytesIO()
                torch.save(state, whole)
                self.stop_short(kind, whole.getvalue(), file)
            save(state, file)
            self.leave()

        return saving

    def around_copy(self, copyfile):
        def copying(source, destination):
            kind = self.come_to(Place.COPYING)
            if kind is not None:
                with open(destination, "wb") as file:
                    self.stop_short(kind, Path(source).read_bytes(), file)
            copied = copyfile(source, destination)
            self.leave()
            return copied

        return copying

    def stop_short(self, kind: Kind, whole: bytes, file) -> None:
        """Let only the fault's fraction of the bytes reach the file."""
        length = int(self.fault.fraction * len(whole))
        if kind in SIGNALS:
            file.write(whole[:length])
            file.flush()
            self.strike()
            self.leave()
        self.strike()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, limits[1]))
        if kind is Kind.BRIEFLY_FULL_DISK:
            threading.Timer(1.0, resource.setrlimit, (resource.RLIMIT_FSIZE, limits)).start()
