"""Concurrent calls by threads, for work that waits on storage or releases the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

from pipeline.config.urls import is_local

REMOTE = 16  # requests in flight

T = TypeVar("T")
Progress = Callable[[int, int, str], None]  # (calls done, total, name of the last)


def in_parallel(call: Callable[[str], T], names: Iterable[str], url: str) -> Iterator[tuple[str, T]]:
    """Yield (name, result) of each call in order of completion, from a thread pool sized for the storage of `url`.

    The first error is raised, and no further call is started.
    """
    # Local calls do not wait: more threads than cores would only contend.
    threads = os.cpu_count() or 1 if is_local(url) else REMOTE
    pool = ThreadPoolExecutor(threads, thread_name_prefix="shards")
    try:
        calls: dict[Future[T], str] = {pool.submit(call, name): name for name in names}
        for done in as_completed(calls):
            yield calls.pop(done), done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
