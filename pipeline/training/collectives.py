"""Collective operations among the ranks: the only module besides the engine that uses `torch.distributed`.

The ranks' parts of a global batch may differ by one row, so gathers pad to the largest and cut afterwards. None of the
operations propagates gradients: every rank differentiates the loss of the whole batch by its own rows (see `step`).

Shapes: B rows of the global batch, n rows of this rank.
"""

import datetime
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.ranks import Ranks

STORE_SECONDS = 5.0  # timeout of a request to the key-value store


class Collectives(Ranks):
    """Collectives of the default process group, initialised on first use; without a launcher it has one rank."""

    calls, inside = 0, ""  # collectives that this rank has entered, and the current one's name, to attribute a hang
    local_rank, device = 0, torch.device("cpu")

    def __init__(self, timeout_seconds: float | None = 1800.0):
        """`timeout_seconds`: of every operation; None: no process group, but a single rank on the CPU."""
        if timeout_seconds is None:
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before NCCL picks a device
        if not dist.is_initialized():
            for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
                os.environ.setdefault(name, value)
            alone = os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in os.environ
            if alone and sys.platform == "linux":  # the backends open a port even for one rank
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
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

    def _call(self, operation: Callable[..., object], *arguments: Any, **named: Any) -> None:
        self.calls, self.inside = self.calls + 1, operation.__name__
        try:
            operation(*arguments, **named)
        finally:
            self.inside = ""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world_size > 1:
            self._call(dist.all_reduce, tensor)
        return tensor

    def largest(self, sizes: list[int]) -> list[int]:
        """Return the elementwise maximum over the ranks."""
        if self.world_size == 1:
            return sizes
        tensor = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        self._call(dist.all_reduce, tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather_rows(self, rows: Tensor, batch: int) -> Tensor:
        """Gather every rank's rows (n, …) into the global batch's order: (B, …)."""
        return self.gather_parts(rows, [stop - start for start, stop in self.shares(batch)])

    def gather_parts(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Concatenate the ranks' rows, `counts[r]` from rank r, on the device of `rows`."""
        if self.world_size == 1:
            return rows.detach().clone()
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.detach()
        gathered = [torch.empty_like(padded) for _ in counts]
        self._call(dist.all_gather, gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]).to(rows.device)

    def fetcher(self, positions: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
        """Build a function that fetches rows of the global batch, sending only the requested rows between ranks.

        `positions` (n,) holds, for each local row, a position in the global batch, or -1 for none. The function takes
        this rank's rows (n, ...) and returns one row per position >= 0, in order. Both calls are collective.
        """
        all_positions, shares = self.gather_rows(positions.to(self.device), batch).cpu(), self.shares(batch)
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
            self._call(dist.all_to_all_single, received, sent, counts, [len(part) for part in requested])
            result = torch.empty_like(received)
            result[order.to(rows.device)] = received
            return result

        return fetch

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather a picklable value from every rank. Unpickling executes code, so all ranks must be trusted."""
        gathered: list[Any] = [None] * self.world_size
        self._call(dist.all_gather_object, gathered, value)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable value on every rank."""
        values = [value]
        self._call(dist.broadcast_object_list, values, src=0)
        return values[0]

    def barrier(self) -> None:
        self._call(dist.barrier)

    @staticmethod
    def close() -> None:
        """Destroy the process group, if any; a process that exits without this can abort."""
        if dist.is_initialized():
            dist.destroy_process_group()


class KeyValueStore:
    """Messages of the ranks, from any thread, waiting for none; RuntimeError or OSError if the store is silent."""

    def __init__(self, collectives: Collectives):
        self._rank, self._world_size = collectives.rank, collectives.world_size
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._store.set_timeout(datetime.timedelta(seconds=STORE_SECONDS))

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
