"""Gloo ranks on this machine, each a new process forked from a server that has imported torch and DeepSpeed.

A rank begins in about 0.1 s instead of the 7 CPU-seconds that importing both takes, and still shares no state with
the ranks of another test.
"""

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

SECONDS = float(os.environ.get("MOME_RANK_SECONDS", "600"))  # raise it on a slow machine
FORK_SERVER = multiprocessing.get_context("forkserver")  # starts on first use and ends with this process
FORK_SERVER.set_forkserver_preload(["torch", "deepspeed", "transformers", "pipeline.training.loop"])


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """Return the results of `function(*arguments)` on every rank, in rank order.

    Raises RuntimeError with the traceback of the first rank that fails, or when a rank dies or exceeds `seconds`.
    """
    results = FORK_SERVER.Queue()
    processes = start_ranks(_send_result, world_size, results, function, arguments)
    received: dict[int, Any] = {}
    try:
        deadline = time.monotonic() + seconds
        while len(received) < world_size:
            dead = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
            try:
                rank, result, error = results.get(timeout=1)  # also the result of a rank that has died since
            except queue.Empty:
                if dead or time.monotonic() >= deadline:
                    reason = f"ranks died with exit codes {dead}" if dead else "a rank gave no result in time"
                    raise RuntimeError(reason) from None
                continue
            if error is not None:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
            received[rank] = pickle.loads(result)  # noqa: S301 - written by our own process
        for process in processes:
            process.join(timeout=20)
    finally:
        for process in processes:
            process.kill()
    return [received[rank] for rank in range(world_size)]


def start_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Start `function(*arguments)` on every rank and return the processes, which the caller has to end."""
    launcher = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(*free_ports(1))}
    processes = []
    for rank in map(str, range(world_size)):
        environment = {**os.environ, **launcher, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        processes.append(FORK_SERVER.Process(target=_rank, args=(environment, function, arguments)))
        processes[-1].start()
    return processes


def exit_codes(function: Callable[..., None], world_size: int, *arguments: Any, of: int | None = None) -> list[Any]:
    """Return the exit codes of ranks that run `function`; None for those still alive when rank `of` (or all) ended."""
    processes = start_ranks(function, world_size, *arguments)
    try:
        for process in processes if of is None else [processes[of]]:
            process.join(SECONDS)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join(20)


def free_ports(count: int) -> list[int]:
    """Return different ports on which no process listens."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


def _rank(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ.clear()  # the fork server has the environment of the first test that used it
    os.environ |= environment
    torch.set_num_threads(1)
    function(*arguments)


def _send_result(results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from pipeline.training.collectives import Collectives

    rank = int(os.environ["RANK"])
    try:
        results.put((rank, pickle.dumps(function(*arguments)), None))  # pickled here, so that tensors travel by value
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        Collectives.close()
