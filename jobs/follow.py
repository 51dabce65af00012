"""What a submitted job prints, as it prints it, until it ends; a connection that breaks is taken up again."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any

from jobs.dashboard import first_line
from pipeline.config.errors import RunFailed
from pipeline.config.redaction import printable

log = logging.getLogger(__name__)

AWAY_SECONDS = 120.0  # that the dashboard may be away
SILENT_SECONDS = 60.0  # without output, after which the job's status is asked for: a dead connection is silent too
POLL_SECONDS = 2.0


def follow(client: Any, job: str) -> str:
    """Stream a job's output to standard error; return the status it ended with.

    Raises RunFailed when the cluster does not answer for `AWAY_SECONDS`.
    """
    output, answered = _Output(), time.monotonic()
    while True:
        try:
            asyncio.run(output.show(client, job))
            status = client.get_job_status(job)
        except KeyboardInterrupt:
            raise
        except Exception as error:  # whatever the HTTP and websocket libraries raise when a head goes away
            if time.monotonic() - answered > AWAY_SECONDS:
                raise RunFailed(
                    f"job {job}: the cluster has not answered for {AWAY_SECONDS:.0f} s ({first_line(error)}). "
                    "If its head is lost, submit again to the new one: the run goes on."
                ) from error
        else:
            answered = time.monotonic()
            if status.is_terminal():
                asyncio.run(output.show(client, job))
                return str(status.value)
        time.sleep(POLL_SECONDS)


class _Output:
    """What a job printed, each character shown once however often the connection breaks."""

    def __init__(self) -> None:
        self._shown = 0

    async def show(self, client: Any, job: str) -> None:
        """Print what is new until the job or the connection ends, or nothing has come for `SILENT_SECONDS`."""
        passed = 0
        chunks = client.tail_job_logs(job)
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), SILENT_SECONDS)
            except (StopAsyncIteration, TimeoutError):
                return
            new = chunk[max(0, self._shown - passed) :]
            passed += len(chunk)
            if new:
                sys.stderr.write(printable(new))
                sys.stderr.flush()
                self._shown = passed
