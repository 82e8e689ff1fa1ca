"""fairseq-train in processes of its own, in which something goes wrong at an exact place."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.commands import PLUGIN, recipe, run_train
from tests.processes import HANGS, forkserver

#: What may go wrong, and where.
KILL, EXCEPTION, OUT_OF_MEMORY, NAN = "kill", "exception", "out of memory", "NaN loss"
FULL_DISK, SKIP = "full disk", "skip"
AT_W, PERTURBED, WRITING, COPYING, UPDATE = "at w", "at w + epsilon", "writing", "copying", "update"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong once.

    Attributes:
        what: One of the constants above. FULL_DISK and KILL leave half of the file, at WRITING and COPYING.
            SKIP is no fault: it leaves out an UPDATE.
        place: One of the constants above.
        visit: How often, from 1, the worker has come to the place by then.
        worker: Which one is hit.
    """

    what: str
    place: str
    visit: int
    worker: int = 0


def train(folder: Path, data: Path, *flags: str, workers: int = 1, fault: Fault | None = None) -> list[int]:
    """Start or resume fairseq-train with asam, meet *fault*, and return the exit status of each worker."""
    arguments = recipe(data, folder, *PLUGIN, "--optimizer", "asam", "--dropout", "0.2", *flags)
    if workers > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments += ["--distributed-world-size", workers, "--distributed-no-spawn"]
        arguments += ["--distributed-init-method", f"tcp://127.0.0.1:{port}"]
        arguments += ["--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]
    processes = []
    for rank in range(workers):
        own = ["--distributed-rank", rank] if workers > 1 else []
        hits = fault if fault is not None and fault.worker == rank else None
        log = folder.with_name(f"{folder.name}-{rank}.log")
        words = [str(word) for word in (*arguments, *own)]
        processes.append(forkserver.Process(target=_train, args=(words, log, hits), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(HANGS)
        process.kill()  # one that waits for ever: its status is then that of the signal
        process.join()
    return [process.exitcode for process in processes]


def _train(arguments: list[str], log: Path, fault: Fault | None) -> None:
    if fault is not None:
        _Injection(fault).install()
    run_train(arguments, log)


class _Injection:
    """Wraps functions of fairseq and the plugin, in this process alone."""

    def __init__(self, fault: Fault):
        self.fault, self.visits, self.perturbed = fault, 0, False

    def install(self) -> None:
        from fairseq import checkpoint_utils
        from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
        from fairseq.trainer import Trainer

        import fairseq_asam.tasks  # noqa: F401  before its functions are wrapped
        from fairseq_asam import Perturbation

        enter, leave = Perturbation.__enter__, Perturbation.__exit__
        forward, step = LabelSmoothedCrossEntropyCriterion.forward, Trainer.train_step
        save, copy = checkpoint_utils._torch_persistent_save, shutil.copyfile

        def entering(perturbation):
            entered = enter(perturbation)
            self.perturbed = True
            return entered

        def leaving(perturbation, *exception):
            self.perturbed = False
            return leave(perturbation, *exception)

        def passing(criterion, model, sample, reduce=True):
            place = PERTURBED if self.perturbed else AT_W
            strikes = criterion.training and self.strikes(place)
            if strikes and self.fault.what == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            loss, sample_size, logging_output = forward(criterion, model, sample, reduce)
            if strikes and self.fault.what != NAN:
                exception = ValueError if self.fault.what == EXCEPTION else RuntimeError  # as torch's is
                raise exception(f"{self.fault.what} (an injected fault)")
            return loss * (float("nan") if strikes else 1.0), sample_size, logging_output

        def updating(trainer, *arguments, **keywords):
            return None if self.strikes(UPDATE) else step(trainer, *arguments, **keywords)

        def saving(state, file):
            if self.strikes(WRITING):
                whole = io.BytesIO()
                torch.save(state, whole)
                self.stop_short(whole.getvalue(), file)
            save(state, file)

        def copying(source, destination):
            if self.strikes(COPYING):
                with open(destination, "wb") as file:
                    self.stop_short(Path(source).read_bytes(), file)
            return copy(source, destination)

        Perturbation.__enter__, Perturbation.__exit__ = entering, leaving
        LabelSmoothedCrossEntropyCriterion.forward, Trainer.train_step = passing, updating
        checkpoint_utils._torch_persistent_save, shutil.copyfile = saving, copying

    def strikes(self, place: str) -> bool:
        """Count a visit to *place*, and return whether the fault strikes now."""
        self.visits += place == self.fault.place
        return place == self.fault.place and self.visits == self.fault.visit

    def stop_short(self, whole: bytes, file) -> None:
        """Let only half of the bytes reach *file*."""
        half = len(whole) // 2
        if self.fault.what == KILL:
            file.write(whole[:half])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
