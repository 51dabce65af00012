"""Ownership of a run: only its latest start may write it.

A launcher that was disconnected or believed dead may come back and continue training concurrently with its successor.
Each start of a run's ranks therefore writes a file to the run's folder, of which the last by name is the owner's:

    <run>/owners/0003-9f86d081.4c1de8a0b2f35a67.json    the start (its number and token), and its launcher's claim

Names are unique, so two starts that claim the run at the same time agree without a conditional write. Ownership is
checked before every commit and deletion. Because the check and the operation are two requests, checkpoints carry the
start in their names, and no start deletes what a later one wrote, however long it was suspended in between.

The restarts of one launcher share its claim. Once another launcher owns the run, they do not take it back, and
`python -m pipeline.training.ownership CONFIG [key=value …]` exits with status 76 under that launcher, which
`infra/slurm.sbatch` checks before it retries; otherwise with 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import psutil

from pipeline.config.errors import MomeError, Superseded
from pipeline.config.load import load_config
from pipeline.data.storage import NotFound, Storage, join

OWNER_FILE = "owners"
CLAIM_VARIABLE = "MOME_CLAIM"  # identifies a launcher across its restarts
_NAME = re.compile(r"(\d{4,})-([0-9a-f]{8})\.([^.]+)\.json")


@dataclass(frozen=True, order=True)
class Start:
    """One start of a run's ranks; a later one is greater."""

    number: int
    token: str

    def __str__(self) -> str:
        return f"{self.number:04d}-{self.token}"


@dataclass
class Ownership:
    """The right to write a run: of one start of a launcher's ranks or, without `start`, of all its restarts."""

    storage: Storage
    folder: str
    claim: str
    start: Start | None = None

    @classmethod
    def take(cls, storage: Storage, folder: str, claim: str | None = None) -> Ownership:
        """Make this start the run's owner; `claim` identifies the launcher (default: this process's, else a new one).

        Raises Superseded if that launcher owned the run and another has taken it since.
        """
        ownership = cls(storage, folder, claim or _claim_of_launcher() or secrets.token_hex(8))
        while True:
            starts = ownership.check(may_begin=True)
            start = Start(starts[-1][0].number + 1 if starts else 1, secrets.token_hex(4))
            record = {"host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
            storage.write(join(folder, OWNER_FILE, f"{start}.{ownership.claim}.json"), json.dumps(record).encode())
            if ownership._starts()[-1][0] == start:  # False if another start claimed the run at the same time
                ownership.start = start
                return ownership

    def check(self, may_begin: bool = False) -> list[tuple[Start, str]]:
        """Return all starts; Superseded if a later one owns the run, unless `may_begin` and this claim is new."""
        starts = self._starts()
        start, claim = starts[-1] if starts else (self.start, self.claim)
        is_new = may_begin and all(claim != self.claim for _, claim in starts)
        if is_new or (claim == self.claim and self.start in (None, start)):
            return starts
        url, where = join(self.folder, OWNER_FILE, f"{start}.{claim}.json"), ""
        with suppress(NotFound, ValueError, KeyError):
            record = json.loads(self.storage.read(url))
            where = f", on {record['host']} at {record['since']}"
        other = f" with another {CLAIM_VARIABLE}" if CLAIM_VARIABLE in os.environ else ""
        raise Superseded(
            f"this run is owned by a later start{where} ({url}); this one ends, and what it has committed is kept. To "
            f"take the run back, start it again{other}"
        )

    def holds(self) -> bool:
        """Return whether no later start owns the run."""
        try:
            self.check()
        except Superseded:
            return False
        return True

    def _starts(self) -> list[tuple[Start, str]]:
        """Return every start and its launcher's claim, in order."""
        matches = map(_NAME.fullmatch, self.storage.list(join(self.folder, OWNER_FILE)))
        return sorted((Start(int(match[1]), match[2]), match[3]) for match in matches if match)


def _claim_of_launcher() -> str | None:
    """Return the claim of this process's launcher; None without a launcher that restarts its ranks."""
    name = os.environ.get(CLAIM_VARIABLE)
    if not name:
        if (run := os.environ.get("TORCHELASTIC_RUN_ID")) is None:
            return None
        agent = psutil.Process(os.getppid())  # torchrun, which outlives the ranks that it restarts
        name = f"{run} {socket.gethostname()} {agent.pid} {agent.create_time()}"
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def main(arguments: list[str]) -> int:
    """Return the exit status: that of Superseded if another launcher owns the run, otherwise 0."""
    try:
        config, claim = load_config(arguments[0], arguments[1:]), _claim_of_launcher()
        if claim is not None:
            Ownership(Storage(config.storage), config.folder, claim).check(may_begin=True)
    except MomeError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
