"""Every interleaving of two attempts' storage calls, for tests of how they affect each other.

    interleavings, states, runs = explore({"old": old_attempt, "new": new_attempt}, begin, check, check_end)

`begin(storage)` fills the store. An attempt is a function of its own Storage; each call of that Storage waits for its
turn, and one call is made at a time. Interleavings that lead to the same store, with both attempts having received the
same results, continue identically, so each such state is entered once; `interleavings` counts the paths.
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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar
from unittest import mock

from pipeline.config.errors import CheckpointError
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Backend, ObjectInfo, PartReader, Storage

T = TypeVar("T")
Attempts = Mapping[str, Callable[[Storage], None]]
SECONDS = 30.0  # seconds for an attempt to reach its next call


class Killed(BaseException):
    """Raised in an attempt whose remaining calls are known, to end it."""


@dataclass
class Disk(Backend):
    """The objects of a store and the attempt that wrote each."""

    objects: dict[str, bytes] = field(default_factory=dict)
    writers: dict[str, str] = field(default_factory=dict)
    who: str = "begin"  # the attempt that is making a call
    faults: list[str] = field(default_factory=list)  # objects of "new" that "old" changed or deleted

    def read(self, path: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(errno.ENOENT, "not there", path)
        return self.objects[path][start:stop]

    def info(self, path: str) -> ObjectInfo:
        data = self.read(path)
        return ObjectInfo(len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())

    def entries(self, path: str) -> Iterator[tuple[str, ObjectInfo | None]]:
        for name in (name.removeprefix(f"{path}/") for name in self.objects if name.startswith(f"{path}/")):
            yield name.partition("/")[0], None if "/" in name else self.info(f"{path}/{name}")

    def write(self, path: str, size: int, part: PartReader, create: bool = False) -> bool:
        if create and path in self.objects:
            return False
        self._note_fault(path)
        self.objects[path], self.writers[path] = part(0, size), self.who
        return True

    def delete(self, path: str) -> None:
        for name in self.below(path):
            self._note_fault(name)
            del self.objects[name], self.writers[name]

    def below(self, path: str) -> list[str]:
        return sorted(name for name in self.objects if name == path or name.startswith(f"{path}/"))

    def _note_fault(self, path: str) -> None:
        is_mark = path.endswith("/SEAL.json")  # of the successor, in a folder that belongs to the old attempt
        if self.who == "old" and self.writers.get(path) == "new" and not is_mark:
            self.faults.append(path)


class TurnStorage(Storage):
    """The Storage of one attempt, whose calls wait for their turn; without `turns` they are made at once."""

    def __init__(self, disk: Disk, turns: _Turns | None = None, name: str = ""):
        super().__init__(StorageConfig(retry_timeout_seconds=1e-3))
        self._disk, self._turns, self._name = disk, turns, name

    def _do(self, url: str, action: str, call: Callable[[Any, str], T]) -> T:
        if (turns := self._turns) is None:
            return super()._do(url, action, lambda backend, path: call(self._disk, url))
        if not turns.is_killed:
            turns.stopped.release()
            turns.go[self._name].acquire()
        if turns.is_killed:
            raise Killed
        self._disk.who, outcome = self._name, ""
        try:
            result = super()._do(url, action, lambda backend, path: call(self._disk, url))
            outcome = repr(result)
            return result
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            raise
        finally:
            received = turns.history[self._name] + f"{action} {url}: {outcome}".encode()
            turns.history[self._name] = hashlib.sha256(received).digest()

    def delete(self, url: str) -> None:
        """Delete a folder's objects one by one, as object stores do."""
        for name in self._disk.below(url) or [url]:
            super().delete(name)


class _Turns:
    """One execution of the attempts: each stops before every call and is resumed individually."""

    def __init__(self, attempts: Attempts):
        self.disk, self.running, self.is_killed = Disk(), "begin", False
        self.history = dict.fromkeys(attempts, b"")  # digest of the results that each attempt has received
        self.errors: list[BaseException] = []
        self.unfinished = list(attempts)
        self.go = {name: threading.Semaphore(0) for name in attempts}
        self.stopped = threading.Semaphore(0)
        self._attempts = attempts
        self._counters = {name: itertools.count(1000 * i + 1) for i, name in enumerate(("begin", *attempts))}
        self._threads = {name: threading.Thread(target=self._run, args=(name,), daemon=True) for name in attempts}

    def _run(self, name: str) -> None:
        try:
            self._attempts[name](TurnStorage(self.disk, self, name))
        except BaseException as error:
            if not self.is_killed:
                self.errors.append(error)
        self.unfinished.remove(name)
        self.stopped.release()

    def step(self, name: str) -> None:
        """Let an attempt start or make its next call, and stop before the one after."""
        self.running = name
        if self._threads[name].ident is None:
            self._threads[name].start()
        else:
            self.go[name].release()
        assert self.stopped.acquire(timeout=SECONDS), f"{name} came to no call and to no end"

    def number(self) -> int:
        """Return a token or time of the attempt that is running."""
        return next(self._counters[self.running])

    def kill(self) -> None:
        self.is_killed = True
        for name, thread in self._threads.items():
            self.go[name].release()
            thread.join(SECONDS)


def explore(
    attempts: Attempts, begin: Callable[[Storage], None], check: Callable[[Disk], None],
    check_end: Callable[[Disk], None], max_switches: int | None = None,
) -> tuple[int, int, int]:  # fmt: skip
    """Enter every state, or those reached with at most `max_switches` switches between the attempts; return the numbers
    of interleavings, states and runs. A failed check, or an error of an attempt, is noted with its schedule.
    """
    successors: dict[bytes, dict[str, bytes]] = {}  # state -> attempt that continues -> next state
    frontier: list[tuple[str, ...]] = [()]
    runs = 0
    clock = mock.Mock(now=lambda tz: datetime(2000, 1, 1, tzinfo=UTC))
    while frontier:
        schedule = list(frontier.pop())
        runs += 1
        turns = _Turns(attempts)

        def state_of(turns: _Turns = turns, schedule: list[str] = schedule) -> tuple[bytes, int]:
            """Return the identity of the state, whose equals have equal continuations, and the number of switches."""
            disk, switches = turns.disk, sum(before != after for before, after in itertools.pairwise(schedule))
            objects = [(name, disk.writers[name], disk.objects[name]) for name in sorted(disk.objects)]
            identity = repr((objects, turns.history, () if max_switches is None else (schedule[-1:], switches)))
            return hashlib.sha256(identity.encode()).digest(), switches

        with (
            mock.patch("secrets.token_hex", lambda size, turns=turns: f"{turns.number():0{2 * size}x}"),
            mock.patch("time.time_ns", lambda turns=turns: turns.number() * 1_000_000),
            mock.patch("pipeline.training.ownership.datetime", clock),
        ):
            begin(TurnStorage(turns.disk))
            try:
                for name in (*attempts, *schedule[:-1]):
                    turns.step(name)
                pending = schedule.pop() if schedule else None
                while True:
                    state, switches = state_of()
                    if pending is None:
                        if state in successors:
                            break
                        if turns.errors:
                            raise AssertionError(f"an attempt ended with {turns.errors[0]!r}") from turns.errors[0]
                        faults = turns.disk.faults
                        assert not faults, f"the superseded attempt changed what its successor wrote: {faults}"
                        check(turns.disk)
                        successors[state] = {}
                        if not turns.unfinished:
                            check_end(turns.disk)
                            break
                        # The attempt that made the last call continues first.
                        names = [n for n in attempts if n in turns.unfinished]
                        names.sort(key=lambda name, last=schedule[-1:]: name not in last)
                        limited = max_switches is not None and switches >= max_switches
                        pending, *others = names[:1] if limited else names
                        frontier += [(*schedule, other) for other in others]
                    schedule.append(pending)
                    turns.step(pending)
                    successors[state][pending], _ = state_of()
                    pending = None
            except (AssertionError, CheckpointError) as error:
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
    return num_paths(next(iter(successors))), len(successors), runs
