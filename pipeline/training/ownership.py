"""Who may write a run: its latest start, and no other.

A head that was cut off, or a launcher thought dead, may come back and train on beside the one that took its run up.
Each start therefore leaves its claim in the run's folder over the one before; and rank 0 reads it before it commits
anything there. What was superseded ends at its next checkpoint or hand-over, having changed nothing.
"""

from __future__ import annotations

import json
import secrets
import socket
from datetime import UTC, datetime

from pipeline.config.errors import Superseded
from pipeline.data.storage import NotFound, Storage, join

OWNER_FILE = "owner.json"


class Ownership:
    """The claim of one start, which all its ranks and their restarts share."""

    def __init__(self, storage: Storage, folder: str, claim: str):
        self._storage, self._url = storage, join(folder, OWNER_FILE)
        self.claim = claim

    @classmethod
    def take(cls, storage: Storage, folder: str) -> Ownership:
        """From now on the run is this start's."""
        ownership = cls(storage, folder, secrets.token_hex(8))
        told = {"claim": ownership.claim, "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
        storage.write(ownership._url, json.dumps(told).encode())
        return ownership

    def check(self) -> None:
        """Raises Superseded when a later start has the run. (What is read and then written is not one transaction:
        a claim that comes between the two is seen at the next check.)"""
        try:
            owner = json.loads(self._storage.read(self._url))
        except NotFound:  # nobody claims it
            return
        if owner["claim"] != self.claim:
            raise Superseded(
                f"this run was taken up by a later start, on {owner['host']} at {owner['since']} ({self._url}); this "
                "one ends and leaves it what is committed"
            )

    def holds(self) -> bool:
        try:
            self.check()
        except Superseded:
            return False
        return True
