"""What ranks say to each other: the only module that speaks `torch.distributed` outside the engine.

Shares of a global batch may differ by one row between ranks, so gathers pad and cut. Nothing here carries a
gradient: the step differentiates the whole batch's loss on every rank and keeps its own rows (see `steps`).

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

Range = tuple[int, int]
P = ParamSpec("P")
R = TypeVar("R")
BOARD_SECONDS = 5.0  # that the board's holder may take to answer


def share(batch: int, rank: int, world_size: int) -> Range:
    """Rows ⌊rB/W⌋ to ⌊(r+1)B/W⌋ (contract C1): shares differ by at most one row, W need not divide B."""
    return rank * batch // world_size, (rank + 1) * batch // world_size


def _counted(
    method: Callable[Concatenate[Collectives, P], R],
) -> Callable[Concatenate[Collectives, P], R]:
    """So that of ranks that wait for each other it can be told which one has not come."""

    @functools.wraps(method)
    def call(self: Collectives, *arguments: P.args, **named: P.kwargs) -> R:
        self.calls += 1
        self.inside = method.__name__
        try:
            return method(self, *arguments, **named)
        finally:
            self.inside = ""

    return call


class Collectives:
    """This process's place among the ranks. Without a launcher it is the only one.

    `calls` counts what this rank asked of the others so far, `inside` names what it waits for now.
    """

    calls, inside = 0, ""

    def __init__(self, timeout_seconds: float = 1800.0):
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before NCCL chooses one
        if not dist.is_initialized():
            for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
                os.environ.setdefault(name, value)
            alone = os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ
            if alone and sys.platform == "linux":  # the backends open a port even for one rank: on no other interface
                for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                    os.environ.setdefault(name, "lo")
            store = dist.HashStore() if alone else None  # in memory: a TCPStore listens on every interface
            dist.init_process_group(
                "nccl" if torch.cuda.is_available() else "gloo",
                timeout=datetime.timedelta(seconds=timeout_seconds),
                store=store,
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
            )
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def shares(self, batch: int) -> list[Range]:
        return [share(batch, rank, self.world_size) for rank in range(self.world_size)]

    @_counted
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(tensor)
        return tensor

    @_counted
    def gather_rows(self, rows: Tensor, batch: int) -> Tensor:
        """Every rank's rows (n, …) in the order of the global batch: (B, …)."""
        return self._gather(rows, [stop - start for start, stop in self.shares(batch)])

    @_counted
    def gather_parts(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Every rank's rows, of which there are `counts`, in the order of the ranks: on the device of `rows`."""
        return self._gather(rows.to(self.device), counts).to(rows.device)

    def _gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @_counted
    def largest(self, sizes: list[int]) -> list[int]:
        """The largest of each number over the ranks."""
        if self.world_size == 1:
            return sizes
        tensor = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def fetcher(self, wanted: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
        """What fetches rows of the global batch from the ranks that hold them: only those travel.

        `wanted` (n,) names for each own row a place in the global batch, or -1 for none. The result takes this rank's
        own rows (n, ...) and gives one row per place named, in order. All ranks call both together.
        """
        everybody = self.gather_rows(wanted.to(self.device), batch).cpu()
        starts = torch.tensor([start for start, _ in self.shares(batch)])
        owner = torch.where(everybody < 0, -1, torch.searchsorted(starts, everybody, right=True) - 1)
        asked = [everybody[start:stop][owner[start:stop] == self.rank] for start, stop in self.shares(batch)]
        start, stop = self.shares(batch)[self.rank]
        mine = owner[start:stop][owner[start:stop] >= 0]
        order = torch.argsort(mine, stable=True)
        counts = torch.bincount(mine, minlength=self.world_size).tolist()

        def fetch(rows: Tensor) -> Tensor:
            if rows.dtype == torch.bool:  # which no backend sends
                return fetch(rows.view(torch.uint8)).view(torch.bool)
            sent = rows[(torch.cat(asked) - start).to(rows.device)]
            received = rows.new_empty(len(mine), *rows.shape[1:])
            dist.all_to_all_single(received, sent, counts, [len(part) for part in asked])
            result = torch.empty_like(received)
            result[order.to(rows.device)] = received
            return result

        return fetch

    @_counted
    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold, in the order of the ranks. Tuples come as lists."""
        own = self._bytes_tensor(json.dumps(value).encode())
        counts = self._gather(torch.tensor([len(own)], device=self.device), [1] * self.world_size).tolist()
        data = self._gather(own, counts).cpu().numpy().tobytes()
        ends = [0, *itertools.accumulate(counts)]
        return [json.loads(data[start:stop]) for start, stop in itertools.pairwise(ends)]

    @_counted
    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold, on every rank. Tuples come as lists."""
        own = self._bytes_tensor(json.dumps(value).encode() if self.rank == 0 else b"")
        length = torch.tensor([len(own)], device=self.device)
        dist.broadcast(length, src=0)
        data = own if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(data, src=0)
        return json.loads(data.cpu().numpy().tobytes())

    def _bytes_tensor(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device) if data else torch.empty(0)

    @_counted
    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, of any kind. They travel as pickles, which run what a stranger among the ranks sends."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    @_counted
    def barrier(self) -> None:
        dist.barrier()

    def board(self) -> Board:
        """What the ranks tell each other without waiting for each other. A connection of its own, for any thread."""
        store: Any = dist.distributed_c10d._get_default_store()
        return Board(store.clone(), self.rank, self.world_size)

    def close(self) -> None:
        close_group()


def close_group() -> None:
    """End the process group, if there is one: a process that exits without this can abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Board:
    """A line of text of each rank, kept by the process group's store; nobody waits for who has not written.

    Every call may raise RuntimeError or OSError when the store's holder does not answer within `BOARD_SECONDS`.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self._store, self._rank, self._world_size = store, rank, world_size
        store.set_timeout(datetime.timedelta(seconds=BOARD_SECONDS))

    def write(self, topic: str, text: str) -> None:
        """In the place of what this rank wrote under the topic before."""
        self._store.set(f"mome/{topic}/{self._rank}", text)

    def read(self, topic: str) -> dict[int, str]:
        """What the ranks that have written under the topic wrote last."""
        names = {rank: f"mome/{topic}/{rank}" for rank in range(self._world_size)}
        return {rank: self._store.get(name).decode() for rank, name in names.items() if self._store.check([name])}

    def call(self, topic: str, text: str) -> None:
        """For all ranks; what was called first under a topic stands."""
        self._store.compare_set(f"mome/{topic}", "", text)

    def called(self, topic: str) -> str | None:
        name = f"mome/{topic}"
        return self._store.get(name).decode() if self._store.check([name]) else None
