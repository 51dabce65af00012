"""Runs a function on several gloo ranks of this machine, each a process of its own, for tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

SECONDS = 300


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank; its results in rank order. A rank's exception fails the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_rank, args=(queue, rank, world_size, port, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        answers = dict(_answer(queue, processes) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(world_size)]


def _answer(queue: Any, processes: list[Any]) -> tuple[int, Any]:
    rank, result, error = queue.get(timeout=SECONDS)
    if error is not None:
        for process in processes:
            process.kill()
        raise AssertionError(f"rank {rank} failed:\n{error}")
    return rank, pickle.loads(result)  # noqa: S301 - our own process's answer


def _rank(
    queue: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((rank, pickle.dumps(function(*arguments)), None))  # pickled here: tensors then travel by value
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
