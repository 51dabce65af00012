"""Storage whose calls fail on demand, for tests of saves, restores, hand-overs and journal commits.

First count the calls of a scenario, then repeat it with every one of them failing:

    scenario(clean := FailingStorage(), folder)              # a local folder or any other URL
    for fault in every_fault(clean.calls):
        with suppress(StorageError):
            scenario(FailingStorage(fault), new_folder)
        check(Storage(), new_folder)                         # what must hold after any failure

A call is one public call of `Storage`, after its retries. `fault.when` says how far it got: "before" (no effect),
"halfway" (a folder lost half of its files; half the parts of an object were requested, and nothing became visible) or
"after" (it took effect, and its answer was lost). `fault.lasting` makes the later calls of the same kind fail as well,
before any effect; with `kind=None` all later calls, as in an outage; `storage.heal()` ends it. Threads may share a
FailingStorage. A copy sent to another process meets the same fault, counted in that process alone.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from pipeline.config.errors import StorageError
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Backend, PartReader, Storage

T = TypeVar("T")
Kind = Literal["read", "look", "list", "write", "upload", "delete", "abandon"]
When = Literal["before", "halfway", "after"]

KINDS: dict[str, Kind] = {"opening": "read", "checking": "look", "checking for": "look", "uploading to": "upload"}
KINDS |= {"reading": "read", "listing": "list", "writing": "write", "deleting": "delete", "aborting uploads": "abandon"}
ALWAYS: tuple[When, ...] = ("before", "halfway", "after")
# Other kinds only fail before: a failure after a read equals one before it.
WHEN: dict[Kind, tuple[When, ...]] = {"write": ALWAYS, "delete": ALWAYS, "upload": ALWAYS[::2], "abandon": ALWAYS[::2]}


class Call(NamedTuple):
    kind: Kind
    url: str
    thread: int


class Fault(NamedTuple):
    """A fault of the `number`th call (from 0) of a kind; None for all kinds."""

    number: int
    kind: Kind | None = None
    when: When = "before"
    lasting: bool = False


def every_fault(calls: Iterable[Call], *, lasting: bool = False) -> Iterator[Fault]:
    """Yield each way in which a scenario of these calls can fail, at every point of each call: once, and for good (with
    `lasting`, only these), of all kinds (an outage) and of the call's own (a quota: reads succeed and writes fail).
    """
    counts: Counter[Kind] = Counter()
    for number, call in enumerate(calls):
        for when in WHEN.get(call.kind, ("before",)):
            if not lasting:
                yield Fault(number, when=when)
            yield Fault(number, when=when, lasting=True)
            yield Fault(counts[call.kind], call.kind, when, lasting=True)
        counts[call.kind] += 1


class FailingStorage(Storage):
    """A Storage with one fault, and the calls that it received."""

    def __init__(self, fault: Fault | None = None, config: StorageConfig = StorageConfig()):
        super().__init__(config)
        self._fault = fault
        self.calls: list[Call] = []
        self.num_failed = 0
        self._counts: Counter[Kind | None] = Counter()
        self._counting = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return FailingStorage, (self._fault, self.config)

    def heal(self) -> None:
        """Let all calls from now on succeed."""
        self._fault = None

    def _do(self, url: str, action: str, call: Callable[[Backend, str], T]) -> T:
        kind, when, fault = KINDS[action], None, self._fault
        with self._counting:
            self.calls.append(Call(kind, url, threading.get_ident()))
            if fault is not None and fault.kind in (None, kind):
                number = self._counts[fault.kind]
                if number == fault.number or (fault.lasting and number > fault.number):
                    when = fault.when if number == fault.number else "before"
            self._counts.update((None, kind))
            self.num_failed += when is not None
        if when == "halfway":
            super()._do(url, action, lambda backend, path: call(_Halfway(backend), path))
        elif when != "before":
            result = super()._do(url, action, call)
            if when is None:
                return result
        raise StorageError(f"{url}: {action} failed: injected fault ({when} its effect).")


@dataclass
class _Halfway:
    """A backend whose writing calls stop in the middle."""

    backend: Backend

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None  # these calls cannot stop halfway: no effect

    def write(self, path: str, size: int, part: PartReader, create: bool) -> None:
        for start in range(0, size // 2, 2**20):
            part(start, min(start + 2**20, size))

    def delete(self, path: str) -> None:
        folders, files = [path], []
        for folder in folders:  # grows meanwhile
            with suppress(NotADirectoryError):
                for name, info in self.backend.entries(folder):
                    (folders if info is None else files).append(f"{folder.rstrip('/')}/{name}")
        for file in sorted(files)[: len(files) // 2]:
            self.backend.delete(file)
