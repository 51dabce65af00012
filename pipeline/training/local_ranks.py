"""Runs a function on several ranks of this machine, each a process of its own: for tests and for `mome bench`."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

SECONDS = float(os.environ.get("MOME_RANK_SECONDS", "600"))  # for a slow machine


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """`function(*arguments)` on every rank, on one thread each; its results in rank order.

    Raises RuntimeError with the traceback of the first rank that fails, or when one of them dies or takes longer.
    """
    port = free_port()
    context = multiprocessing.get_context("spawn")
    answered = context.Queue()
    processes = [
        context.Process(target=_rank, args=(answered, rank, world_size, port, function, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + seconds
        answers = dict(_answer(answered, processes, deadline) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(world_size)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(rank: int, world_size: int, port: int) -> None:
    """This process is that rank, as a launcher would tell it, on one thread."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)


def _answer(answered: Any, processes: list[Any], deadline: float) -> tuple[int, Any]:
    rank, result, error = _received(answered, processes, deadline)
    if error is not None:
        for process in processes:
            process.kill()
        raise RuntimeError(f"rank {rank} failed:\n{error}")
    return rank, pickle.loads(result)  # noqa: S301 - our own process's answer


def _received(answered: Any, processes: list[BaseProcess], deadline: float) -> tuple[int, bytes, str | None]:
    while True:
        dead = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
        try:
            return answered.get(timeout=1)  # also of a rank that has answered and died since
        except queue.Empty:
            if not dead and time.monotonic() < deadline:
                continue
        for process in processes:
            process.kill()
        raise RuntimeError(f"ranks died, with these exit codes: {dead}" if dead else "no rank answered in time")


def _rank(
    answered: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    from pipeline.training.collectives import close_group

    become(rank, world_size, port)
    try:
        answered.put((rank, pickle.dumps(function(*arguments)), None))  # pickled here: tensors then travel by value
    except BaseException:
        answered.put((rank, None, traceback.format_exc()))
    finally:
        close_group()
