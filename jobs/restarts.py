"""Restarts of a run: each is recorded with its cause, shown to whoever follows the run, and charged to its budget."""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any

from ray.train import UserCallback

from jobs.cluster import count_anew, first_words
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join

log = logging.getLogger(__name__)

FOLDER = "restarts"
FAILED = "failed"
MESSAGE = 400  # characters of an error that are worth keeping


@dataclass(frozen=True)
class Restart:
    """One reason for which all ranks began again from a checkpoint."""

    time: float  # seconds since 1970
    cause: str  # failed, preempted or grown
    message: str


class Restarts(UserCallback):
    """The restarts since this driver began, in the run's folder. Ray Train's controller, a process of its own, tells
    of failures; the driver of ranks that saved and stopped.
    """

    def __init__(self, config: RunConfig):
        self._config = config.model_dump_json()
        self._url = join(config.folder, FOLDER)
        self._session = f"{int(time.time()):010d}-{secrets.token_hex(2)}"

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller, once for each failure of the group."""
        try:
            told = "; ".join(f"rank {rank}: {first_words(error)}" for rank, error in sorted(worker_exceptions.items()))
            self.record(FAILED, told)
        except Exception as error:  # the record may be missing; the restart must not
            log.warning("restart not recorded: %s", error)
        count_anew()  # a lost node must not be counted on when the ranks are placed anew

    def record(self, cause: str, message: str) -> None:
        data = json.dumps(asdict(Restart(time.time(), cause, message[:MESSAGE]))).encode()
        self._storage().write(join(self._url, f"{self._session}-{time.time_ns():020d}.json"), data)

    def list(self) -> list[Restart]:
        """In the order they happened, since this driver began."""
        storage = self._storage()
        names = sorted(name for name in storage.list(self._url) if name.startswith(self._session))
        return [Restart(**json.loads(storage.read(join(self._url, name)))) for name in names]

    def count(self, cause: str) -> int:
        return sum(restart.cause == cause for restart in self.list())

    def _storage(self) -> Storage:
        return Storage(RunConfig.model_validate_json(self._config).storage)
