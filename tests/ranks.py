"""Runs a function on several gloo ranks of this machine, each a process of its own, for tests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from pipeline.training.local_ranks import SECONDS, become, free_port, run_ranks

__all__ = ["SECONDS", "run_ranks", "say_to", "start_ranks"]


def start_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` begun on every rank: the processes, for tests in which some do not end as they should.

    Whoever starts them ends them.
    """
    port = free_port()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def say_to(path: str) -> None:
    """From now on this process's standard error, also what C code writes to it, is that file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    become(rank, world_size, port)
    function(*arguments)
