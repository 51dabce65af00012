"""Storage whose calls fail on demand, for tests of saves, restores, hand-overs and journal commits.

First count the calls of a scenario, then repeat it with every one of them failing:

    clean = FailingStorage()
    scenario(clean, folder)                                  # a local folder or any other URL
    for fault in every_fault(clean.calls):
        storage = FailingStorage(fault)
        with suppress(StorageError):
            scenario(storage, new_folder)
        assert storage.num_failed                            # the fault was met
        check(Storage(), new_folder)                         # what must hold after any failure

A call is one public call of `Storage` (after its retries). Its kind is one of KINDS. `fault.when` says how far it got:

- "before": it had no effect.
- "halfway": a folder lost half of its files; half the parts of an object were asked for, and nothing became visible.
- "after": it took effect, and its answer was lost.

`fault.lasting` makes the later calls of the same kind fail as well, before any effect; with `kind=None` all later
calls, as in an outage. `storage.heal()` ends it. `everywhere(fault)` does the same to every Storage of this process,
for code that makes its own. Threads may share a FailingStorage. A copy sent to another process meets the same fault,
counted in that process alone.

`storage.calls` holds kind, URL and thread of every call, failed ones included: a test that a thread makes no storage
call compares `call.thread` with `threading.get_ident()`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from unittest import mock

from pipeline.config.errors import StorageError
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import PartReader, Storage
from pipeline.data.storage.backends import LocalBackend as Backend

T = TypeVar("T")
Kind = Literal["read", "look", "list", "write", "upload", "delete", "abandon"]
When = Literal["before", "halfway", "after"]

KINDS: dict[str, Kind] = {  # the action of Storage's message -> kind
    "reading": "read",  # read, read_range
    "opening": "read",
    "checking": "look",  # info
    "checking for": "look",  # exists
    "listing": "list",  # list, list_info
    "writing": "write",  # write, write_parts
    "uploading to": "upload",
    "deleting": "delete",
    "aborting uploads": "abandon",
}
WHEN: dict[Kind, tuple[When, ...]] = {  # a failure after a read equals one before it: nothing changed
    "read": ("before",),
    "look": ("before",),
    "list": ("before",),
    "write": ("before", "halfway", "after"),
    "upload": ("before", "after"),
    "delete": ("before", "halfway", "after"),
    "abandon": ("before", "after"),
}


@dataclass(frozen=True)
class Call:
    kind: Kind
    url: str
    thread: int


@dataclass(frozen=True)
class Fault:
    """A fault of the `number`th call (from 0) of a kind; None for all kinds."""

    number: int
    kind: Kind | None = None
    when: When = "before"
    lasting: bool = False


def every_fault(calls: Iterable[Call], *, lasting: bool | None = None) -> Iterator[Fault]:
    """Yield each way in which a scenario of these calls can fail: once and for good, at every point of every call.

    Lasting faults are yielded twice: of all kinds (an outage) and of the call's own kind (such as a quota: reads
    succeed and writes fail). `lasting` restricts to lasting faults (True) or single ones (False).
    """
    counts: Counter[Kind] = Counter()
    for number, call in enumerate(calls):
        for when in WHEN[call.kind]:
            if lasting is not True:
                yield Fault(number, when=when)
            if lasting is not False:
                yield Fault(number, when=when, lasting=True)
                yield Fault(counts[call.kind], call.kind, when, lasting=True)
        counts[call.kind] += 1


class Injector:
    """Counter of calls that decides which of them fail."""

    def __init__(self, fault: Fault | None = None):
        self.fault = fault
        self.calls: list[Call] = []
        self.num_failed = 0
        self._counts: Counter[Kind | None] = Counter()
        self._lock = threading.Lock()

    def do(
        self, original: Callable[..., Any], storage: Storage, url: str, action: str, call: Callable[[Backend, str], T]
    ) -> T:
        """Run `original`, which is `Storage._do`, with the injected fault."""
        kind, when = KINDS[action], None
        with self._lock:
            self.calls.append(Call(kind, url, threading.get_ident()))
            number = {None: self._counts[None], kind: self._counts[kind]}
            self._counts.update((None, kind))
            if self.fault is not None and self.fault.kind in number:
                if number[self.fault.kind] == self.fault.number:
                    when = self.fault.when
                elif self.fault.lasting and number[self.fault.kind] > self.fault.number:
                    when = "before"
            self.num_failed += when is not None
        if when is None:
            return original(storage, url, action, call)
        if when == "after":
            original(storage, url, action, call)
        elif when == "halfway":
            original(storage, url, action, lambda backend, path: call(_Halfway(backend), path))
        raise StorageError(f"{url}: {action} failed: injected fault ({when} its effect).")


class FailingStorage(Storage):
    """A Storage with one fault."""

    def __init__(self, fault: Fault | None = None, config: StorageConfig = StorageConfig()):
        super().__init__(config)
        self._injector = Injector(fault)
        self.calls = self._injector.calls

    @property
    def num_failed(self) -> int:
        return self._injector.num_failed

    def heal(self) -> None:
        """Let all calls from now on succeed."""
        self._injector.fault = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FailingStorage, (self._injector.fault, self.config)

    def _do(self, url: str, action: str, call: Callable[[Backend, str], T]) -> T:
        return self._injector.do(Storage._do, self, url, action, call)


@contextmanager
def everywhere(fault: Fault | None = None) -> Iterator[Injector]:
    """Apply the fault to every Storage of this process, counted over all of them, while the block runs."""
    injector, original = Injector(fault), Storage._do

    def do(storage: Storage, url: str, action: str, call: Callable[[Backend, str], T]) -> T:
        return injector.do(original, storage, url, action, call)

    with mock.patch.object(Storage, "_do", do):
        yield injector


class _Halfway:
    """A backend whose writing calls stop in the middle."""

    def __init__(self, backend: Backend):
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None  # these calls cannot stop halfway: no effect

    def write(self, path: str, size: int, part: PartReader, create: bool = False) -> None:
        for start in range(0, size // 2, 2**20):
            part(start, min(start + 2**20, size))

    def delete(self, path: str) -> None:
        folders, files = [path], []
        while folders:
            folder = folders.pop()
            with suppress(NotADirectoryError):
                for name, info in self._backend.entries(folder).items():
                    (folders if info is None else files).append(f"{folder.rstrip('/')}/{name}")
        for file in sorted(files)[: len(files) // 2]:
            self._backend.delete(file)
