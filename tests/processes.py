"""Runs a function in several processes that know each other through gloo."""

from __future__ import annotations

import multiprocessing
import socket
import traceback

import torch
import torch.distributed as dist

# Importing torch and fairseq takes seconds. One process does it, where fairseq is installed, and each process
# of the tests is a fork of it. torch imports torch._dynamo for the first optimizer of a process.
forkserver = multiprocessing.get_context("forkserver")
# fairseq_asam is not among what it imports: fairseq registers the plugin only where it imports it itself.
forkserver.set_forkserver_preload(
    [
        *("pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
        *("torch.distributed.optim", "fairseq_cli.train", "fairseq_cli.generate"),
    ]
)


#: Seconds after which processes are taken to hang, however slow the machine.
HANGS = 1800


def in_processes(count: int, function, *arguments) -> list:
    """Return what ``function(*arguments)`` returned in each process, all in one process group."""
    return started(count, _with_process_group, function, arguments)


def started(count: int, function, *arguments) -> list:
    """Return what ``function(rank, count, port, *arguments)`` returned in each of *count* processes, which
    must be picklable. *port* is free. A process that raises or hangs fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = forkserver.Queue()
    processes = [
        forkserver.Process(target=_run, args=(queue, function, (rank, count, port, *arguments)), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=HANGS) for _ in processes)
    for process in processes:
        process.join(30)
        process.kill()
    failures = [result for result in results.values() if isinstance(result, _Failure)]
    assert not failures, failures[0]
    return [results[rank] for rank in range(count)]


class _Failure(str):
    """A traceback."""


def _run(queue, function, arguments):
    torch.set_num_threads(1)
    try:
        queue.put((arguments[0], function(*arguments)))
    except BaseException:
        queue.put((arguments[0], _Failure(traceback.format_exc())))


def _with_process_group(rank, count, port, function, arguments):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    try:
        return function(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
