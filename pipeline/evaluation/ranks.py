"""An evaluation shared among ranks, with the same result for any number of them.

Rows are cut into batches by their numbers alone, and a batch is computed whole by one rank: whoever computes it makes
the same forward, so results are equal to the last bit. All ranks make equally many forwards, those with fewer batches
by repeating one, because at ZeRO 3 every forward gathers weights from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config.errors import MomeError


class Ranks(Protocol):
    """The processes that share an evaluation. Every call is made by all of them together."""

    rank: int
    world_size: int

    def shares(self, count: int) -> list[tuple[int, int]]:
        """Which of `count` things each rank has: from, up to and without."""
        ...

    def gather_parts(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Every rank's rows, of which there are `counts`, in the order of the ranks; on every rank."""
        ...

    def gather_objects(self, value: Any) -> list[Any]: ...


class SingleProcess:
    """This process, when it shares with nobody."""

    rank, world_size = 0, 1

    def shares(self, count: int) -> list[tuple[int, int]]:
        return [(0, count)]

    def gather_parts(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return rows

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


SINGLE_PROCESS = SingleProcess()


def rank_batches(count: int, batch: int, ranks: Ranks) -> Iterator[tuple[slice, bool]]:
    """The rows of each batch that this rank computes, and whether they are its own or only keep step with others."""
    number = -(-count // batch)
    shares = ranks.shares(number)
    start, stop = shares[ranks.rank]
    for turn in range(max(stop - start for start, stop in shares)):
        is_own = start + turn < stop
        first = min(start + turn, number - 1) * batch
        yield slice(first, min(first + batch, count)), is_own


def compute_batches(
    count: int, batch: int, ranks: Ranks, compute: Callable[[slice], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `compute` gives for the batches of `count` > 0 rows, put together in their order; on every rank.

    A batch may give any number of rows, the same in each of its tensors.
    """
    found: list[tuple[Tensor, ...]] = []
    for rows, is_own in rank_batches(count, batch, ranks):
        part = compute(rows)
        found.append(part if is_own else tuple(tensor[:0] for tensor in part))
    own = [torch.cat(parts) for parts in zip(*found, strict=True)]
    counts = ranks.gather_objects(len(own[0]))
    return tuple(ranks.gather_parts(rows, counts) for rows in own)


def run_on_all_ranks(ranks: Ranks, work: Callable[[], Any]) -> list[Any]:
    """`work` on each rank and what it gave on all; the first MomeError of any rank is raised on every one.

    So nobody is left waiting for a rank that cannot go on. `work` itself asks nothing of the other ranks.
    """
    try:
        answers = ranks.gather_objects((work(), None))
    except MomeError as error:
        answers = ranks.gather_objects((None, error))
    for _, failed in answers:
        if failed is not None:
            raise failed
    return [answer for answer, _ in answers]
