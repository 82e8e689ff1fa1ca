"""Runs a function in several processes that know each other through gloo."""

import multiprocessing
import socket
import traceback

import torch
import torch.distributed as dist

_processes = multiprocessing.get_context("spawn")


def in_processes(count, function, *arguments):
    """Return what ``function(*arguments)`` returned in each process. One that hangs fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = _processes.Queue()
    workers = [
        _processes.Process(target=_run, args=(queue, rank, count, port, function, arguments), daemon=True)
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=180) for _ in workers)
    for worker in workers:
        worker.join(30)
        worker.kill()
    failures = [result for result in results.values() if isinstance(result, _Failure)]
    assert not failures, failures[0]
    return [results[rank] for rank in range(count)]


class _Failure(str):
    """A traceback."""


def _run(queue, rank, count, port, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    try:
        queue.put((rank, function(*arguments)))
    except BaseException:
        queue.put((rank, _Failure(traceback.format_exc())))
    if dist.is_initialized():
        dist.destroy_process_group()
