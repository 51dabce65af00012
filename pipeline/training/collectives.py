"""Collective operations among the ranks: the only module besides the engine that uses `torch.distributed`.

The ranks' parts of a global batch may differ by one row, so gathers pad to the largest and cut afterwards. None of the
operations propagates gradients: every rank differentiates the loss of the whole batch with respect to its own rows (see
`step`).

Shapes: B rows of the global batch, n rows of this rank.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.ranks import Ranks

Range = tuple[int, int]
P = ParamSpec("P")
R = TypeVar("R")
STORE_SECONDS = 5.0  # timeout of a request to the key-value store


def share(batch: int, rank: int, world_size: int) -> Range:
    """Return the row range [⌊rB/W⌋, ⌊(r+1)B/W⌋) (contract C1); W need not divide B. Sizes differ by at most 1."""
    return rank * batch // world_size, (rank + 1) * batch // world_size


def _counted(method: Callable[Concatenate[Collectives, P], R]) -> Callable[Concatenate[Collectives, P], R]:
    """Record the collective each rank is in, so that a hang can be attributed to the rank that never entered it."""

    @functools.wraps(method)
    def call(self: Collectives, *arguments: P.args, **named: P.kwargs) -> R:
        self.calls += 1
        outer, self.inside = self.inside, self.inside or method.__name__
        try:
            return method(self, *arguments, **named)
        finally:
            self.inside = outer

    return call


class Collectives(Ranks):
    """Collectives of the default process group, which is initialised on first use; without a launcher it has one rank.

    `calls` counts the collectives this rank has entered; `inside` names the one it is currently in.
    """

    calls, inside = 0, ""

    def __init__(self, timeout_seconds: float = 1800.0):
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before NCCL picks a device
        if not dist.is_initialized():
            for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
                os.environ.setdefault(name, value)
            alone = os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ
            if alone and sys.platform == "linux":  # the backends open a port even for one rank
                for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                    os.environ.setdefault(name, "lo")
            dist.init_process_group(
                "nccl" if torch.cuda.is_available() else "gloo",
                timeout=datetime.timedelta(seconds=timeout_seconds),
                store=dist.HashStore() if alone else None,  # in memory: a TCPStore listens on every interface
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
            )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @classmethod
    def without_group(cls) -> Collectives:
        """Return the collectives of a single rank on the CPU that uses no process group."""
        alone = cls.__new__(cls)
        alone.rank, alone.world_size, alone.local_rank, alone.device = 0, 1, 0, torch.device("cpu")
        return alone

    def shares(self, batch: int) -> list[Range]:
        return [share(batch, rank, self.world_size) for rank in range(self.world_size)]

    @_counted
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @_counted
    def gather_rows(self, rows: Tensor, batch: int) -> Tensor:
        """Gather every rank's rows (n, …) into the global batch's order: (B, …)."""
        return self.gather_parts(rows, [stop - start for start, stop in self.shares(batch)])

    @_counted
    def gather_parts(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate the ranks' rows, `counts[r]` from rank r, on the device of `rows`."""
        if self.world_size == 1:
            return rows.detach().clone()
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.detach()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]).to(rows.device)

    @_counted
    def largest(self, sizes: list[int]) -> list[int]:
        """Return the elementwise maximum over the ranks."""
        if self.world_size == 1:
            return sizes
        tensor = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def fetcher(self, positions: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
        """Build a function that fetches rows of the global batch, sending only the requested rows between ranks.

        `positions` (n,) holds, for each local row, a position in the global batch, or -1 for none. The returned
        function takes this rank's rows (n, ...) and returns one row per position >= 0, in order. Both calls are
        collective.
        """
        all_positions = self.gather_rows(positions.to(self.device), batch).cpu()
        shares = self.shares(batch)
        starts = torch.tensor([start for start, _ in shares])
        owner = torch.where(all_positions < 0, -1, torch.searchsorted(starts, all_positions, right=True) - 1)
        requested = [all_positions[start:stop][owner[start:stop] == self.rank] for start, stop in shares]
        start, stop = shares[self.rank]
        own_sources = owner[start:stop][owner[start:stop] >= 0]
        order = torch.argsort(own_sources, stable=True)
        counts = torch.bincount(own_sources, minlength=self.world_size).tolist()

        def fetch(rows: Tensor) -> Tensor:
            if rows.dtype == torch.bool:  # no backend supports bool
                return fetch(rows.view(torch.uint8)).view(torch.bool)
            sent = rows[(torch.cat(requested) - start).to(rows.device)]
            if self.world_size == 1:
                return sent.detach()
            received = rows.new_empty(len(own_sources), *rows.shape[1:])
            dist.all_to_all_single(received, sent, counts, [len(part) for part in requested])
            result = torch.empty_like(received)
            result[order.to(rows.device)] = received
            return result

        return fetch

    @_counted
    def gather_json(self, value: Any) -> list[Any]:
        """Gather a JSON-serialisable value from every rank, in rank order. Tuples arrive as lists."""
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        counts = self.gather_parts(torch.tensor([len(own)]), [1] * self.world_size).tolist()
        data = self.gather_parts(own, counts).numpy().tobytes()
        ends = [0, *itertools.accumulate(counts)]
        return [json.loads(data[start:stop]) for start, stop in itertools.pairwise(ends)]

    @_counted
    def broadcast_json(self, value: Any) -> Any:
        """Return rank 0's JSON-serialisable value on every rank. Tuples arrive as lists."""
        data = torch.frombuffer(bytearray(json.dumps(value if self.rank == 0 else None).encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)], device=self.device)
        dist.broadcast(length, src=0)
        data = data.to(self.device) if self.rank == 0 else data.new_empty(int(length), device=self.device)
        dist.broadcast(data, src=0)
        return json.loads(data.cpu().numpy().tobytes())

    @_counted
    def gather_objects(self, value: Any) -> list[Any]:
        """Gather a picklable value from every rank. Unpickling executes code, so all ranks must be trusted."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    @_counted
    def barrier(self) -> None:
        dist.barrier()

    def key_value_store(self) -> KeyValueStore:
        """Return a connection of its own to the process group's store, usable from any thread."""
        store: Any = dist.distributed_c10d._get_default_store()
        return KeyValueStore(store.clone(), self.rank, self.world_size)

    @staticmethod
    def close() -> None:
        """Destroy the process group, if any; a process that exits without this can abort."""
        if dist.is_initialized():
            dist.destroy_process_group()


class KeyValueStore:
    """Messages of the ranks in the process group's store; no operation waits for another rank.

    Every call raises RuntimeError or OSError if the store's host does not respond within `STORE_SECONDS`.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store, rank, world_size
        store.set_timeout(datetime.timedelta(seconds=STORE_SECONDS))

    def write(self, topic: str, text: str) -> None:
        """Replace this rank's message under the topic."""
        self._store.set(f"mome/{topic}/{self._rank}", text)

    def read(self, topic: str) -> dict[int, str]:
        """Return the latest message of each rank that has written under the topic."""
        names = {rank: f"mome/{topic}/{rank}" for rank in range(self._world_size)}
        return {rank: self._store.get(name).decode() for rank, name in names.items() if self._store.check([name])}

    def announcement(self, topic: str, text: str = "") -> str:
        """Return the topic's announcement for all ranks, which `text` becomes if there is none yet."""
        return self._store.compare_set(f"mome/{topic}", "", text).decode()
