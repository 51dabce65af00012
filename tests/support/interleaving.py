"""Every interleaving of two attempts' storage calls, for tests of how they affect each other.

    explored = explore({"old": old_attempt, "new": new_attempt}, begin, check, check_end)

`begin(storage)` fills the store. An attempt is a function of its own Storage; each call of that Storage waits for its
turn, and one call is made at a time. Interleavings that lead to the same store, with both attempts having received the
same results, continue identically, so each such state is entered once; `explored.interleavings` counts the paths.
`check(disk)` is called in every state: it sees what a third process would see if both attempts were killed there.
`check_end` is called where both have ended.

Attempts must be functions of what they read: `explore` replaces tokens and times by a counter for each attempt.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar
from unittest import mock

from pipeline.config.schema import StorageConfig
from pipeline.data.storage import ObjectInfo, PartReader, Storage

T = TypeVar("T")
SECONDS = 30.0  # seconds for an attempt to reach its next call


class Killed(BaseException):
    """Raised in an attempt whose remaining calls are known, to end it."""


@dataclass
class Disk:
    """The objects of a store and the attempt that wrote each. Implements Backend."""

    objects: dict[str, bytes] = field(default_factory=dict)
    writers: dict[str, str] = field(default_factory=dict)
    who: str = "begin"  # the attempt that is making a call
    retries = False
    faults: list[str] = field(default_factory=list)  # objects of "new" that "old" changed or deleted

    def digest(self) -> bytes:
        digest = hashlib.sha256()
        for name in sorted(self.objects):
            digest.update(f"{name}\0{self.writers[name]}\0{len(self.objects[name])}\0".encode() + self.objects[name])
        return digest.digest()

    def read(self, path: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        try:
            return self.objects[path][start:stop]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "not there", path) from None

    def info(self, path: str) -> ObjectInfo:
        data = self.read(path)
        return ObjectInfo(len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())

    def exists(self, path: str) -> bool:
        return bool(self.below(path))

    def entries(self, path: str) -> dict[str, ObjectInfo | None]:
        names = [name.removeprefix(f"{path}/") for name in self.objects if name.startswith(f"{path}/")]
        return {n.partition("/")[0]: None if "/" in n else self.info(f"{path}/{n}") for n in names}

    def write(self, path: str, size: int, part: PartReader, create: bool = False) -> bool:
        if create and path in self.objects:
            return False
        self._touch(path)
        self.objects[path], self.writers[path] = part(0, size), self.who
        return True

    def abort_uploads(self, path: str, chosen: Callable[[str], bool]) -> int:
        return 0

    def delete(self, path: str) -> None:
        for name in self.below(path):
            self._touch(name)
            del self.objects[name], self.writers[name]

    def below(self, path: str) -> list[str]:
        return sorted(name for name in self.objects if name == path or name.startswith(f"{path}/"))

    def _touch(self, path: str) -> None:
        is_mark = path.endswith("/SEAL.json")  # of the successor, in a folder that belongs to the old attempt
        if self.who == "old" and self.writers.get(path) == "new" and not is_mark:
            self.faults.append(path)


class DiskStorage(Storage):
    def __init__(self, disk: Disk):
        super().__init__(StorageConfig(retry_timeout_seconds=1e-3))
        self._disk = disk

    def _backend(self, url: str) -> tuple[Any, str]:
        return self._disk, url


class TurnStorage(DiskStorage):
    """The Storage of one attempt, whose calls wait for their turn."""

    def __init__(self, turns: _Turns, name: str):
        super().__init__(turns.disk)
        self._turns, self._name = turns, name

    def _do(self, url: str, action: str, call: Callable[[Any, str], T]) -> T:
        with self._turns.turn(self._name) as record:
            try:
                result = super()._do(url, action, call)
            except Exception as error:
                record(f"{action} {url}: {type(error).__name__}: {error}")
                raise
            record(f"{action} {url}: {result!r}")
            return result

    def delete(self, url: str) -> None:
        """Delete a folder's objects one by one, as object stores do."""
        for name in self._disk.below(url) or [url]:
            super().delete(name)


class _Turns:
    """One execution of the attempts: each stops before every call and is resumed individually.

    Tokens and times are numbers of the attempt that is running.
    """

    def __init__(self, attempts: Mapping[str, Callable[[Storage], None]], disk: Disk):
        self.disk = disk
        self.running = "begin"
        self.history = dict.fromkeys(attempts, b"")  # digest of the results that each attempt has received
        self.errors: list[BaseException] = []
        self.finished: set[str] = set()
        self._attempts = attempts
        self._go = {name: threading.Semaphore(0) for name in attempts}
        self._stopped = threading.Semaphore(0)
        self._counters = {name: itertools.count(1000 * i + 1) for i, name in enumerate(("begin", *attempts))}
        self._is_killed = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Let every attempt run up to its first call."""
        for name in self._attempts:
            self.running = name
            thread = threading.Thread(target=self._run, args=(name,), daemon=True)
            self._threads.append(thread)
            thread.start()
            self._wait()

    def _run(self, name: str) -> None:
        try:
            self._attempts[name](TurnStorage(self, name))
        except Killed:
            pass
        except BaseException as error:
            if not self._is_killed:
                self.errors.append(error)
        self.finished.add(name)
        self._stopped.release()

    def _wait(self) -> None:
        assert self._stopped.acquire(timeout=SECONDS), f"{self.running} came to no call and to no end"

    @contextmanager
    def turn(self, name: str) -> Iterator[Callable[[str], None]]:
        if self._is_killed:
            raise Killed
        self._stopped.release()
        self._go[name].acquire()
        if self._is_killed:
            raise Killed
        self.disk.who = name

        def record(text: str) -> None:
            self.history[name] = hashlib.sha256(self.history[name] + text.encode()).digest()

        yield record

    def step(self, name: str) -> None:
        """Let an attempt make its next call and stop before the one after."""
        self.running = name
        self._go[name].release()
        self._wait()

    def enabled(self) -> list[str]:
        return [name for name in self._attempts if name not in self.finished]

    def number(self) -> int:
        return next(self._counters[self.running])

    def kill(self) -> None:
        self._is_killed = True
        for name in self.enabled():
            self._go[name].release()
        for thread in self._threads:
            thread.join(SECONDS)


@dataclass(frozen=True)
class Explored:
    interleavings: int
    states: int
    runs: int


def explore(
    attempts: Mapping[str, Callable[[Storage], None]],
    begin: Callable[[Storage], None],
    check: Callable[[Disk], None],
    check_end: Callable[[Disk], None],
    max_switches: int | None = None,
) -> Explored:
    """Enter every state, or those reached with at most `max_switches` switches between the attempts.

    An AssertionError of a check, or an error of an attempt, names the schedule that led there.
    """
    successors: dict[bytes, dict[str, bytes]] = {}  # state -> attempt that continues -> next state
    frontier: list[tuple[str, ...]] = [()]
    runs = 0
    while frontier:
        schedule = list(frontier.pop())
        runs += 1
        turns = _Turns(attempts, Disk())

        def num_switches(schedule: list[str] = schedule) -> int:
            return sum(before != after for before, after in itertools.pairwise(schedule))

        def key(turns: _Turns = turns, schedule: list[str] = schedule) -> bytes:
            """Return the identity of the state; equal states have equal continuations."""
            digest = hashlib.sha256(b"".join([turns.disk.digest(), *turns.history.values()])).digest()
            return digest if max_switches is None else digest + f"{schedule[-1:]}{num_switches(schedule)}".encode()

        with (
            mock.patch("secrets.token_hex", lambda size, turns=turns: f"{turns.number():0{2 * size}x}"),
            mock.patch("time.time_ns", lambda turns=turns: turns.number() * 1_000_000),
            mock.patch("pipeline.training.ownership.datetime", _Moment),
        ):
            begin(DiskStorage(turns.disk))
            turns.start()
            try:
                for name in schedule[:-1]:
                    turns.step(name)
                pending = schedule.pop() if schedule else None
                while True:
                    state = key()
                    if pending is None:
                        if state in successors:
                            break
                        _check(turns, check, check_end)
                        successors[state] = {}
                        # The attempt that made the last call continues first.
                        names = sorted(turns.enabled(), key=lambda name, last=schedule[-1:]: name not in last)
                        if max_switches is not None and num_switches() >= max_switches:
                            names = names[:1]
                        if not names:
                            break
                        pending, *others = names
                        frontier += [(*schedule, other) for other in others]
                    schedule.append(pending)
                    turns.step(pending)
                    successors[state][pending] = key()
                    pending = None
            except AssertionError as error:
                calls = ", ".join(f"{name} x {len(list(group))}" for name, group in itertools.groupby(schedule))
                error.add_note(f"after the calls of {calls}")
                raise
            finally:
                turns.kill()

    @cache
    def num_paths(state: bytes) -> int:
        return sum(num_paths(after) for after in successors[state].values()) or 1

    for state in reversed(successors):  # later states first: no deep recursion
        num_paths(state)
    return Explored(num_paths(next(iter(successors))), len(successors), runs)


def _check(turns: _Turns, check: Callable[[Disk], None], check_end: Callable[[Disk], None]) -> None:
    if turns.errors:
        raise AssertionError(f"an attempt ended with {turns.errors[0]!r}") from turns.errors[0]
    assert not turns.disk.faults, f"the superseded attempt changed what its successor wrote: {turns.disk.faults}"
    check(turns.disk)
    if not turns.enabled():
        check_end(turns.disk)


class _Moment(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime(2000, 1, 1, tzinfo=UTC)
