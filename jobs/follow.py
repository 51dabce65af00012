"""What a submitted job prints, as it prints it, until it ends; a connection that breaks is taken up again."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any

from jobs.dashboard import first_line
from pipeline.config.errors import RunFailed
from pipeline.config.printable import printable

log = logging.getLogger(__name__)

AWAY_SECONDS = 120.0  # that the dashboard may be away
POLL_SECONDS = 2.0


def follow(client: Any, job: str) -> str:
    """Stream a job's output to standard error; returns the status it ended with.

    Raises RunFailed when the cluster does not answer for `AWAY_SECONDS`.
    """
    shown, answered = 0, time.monotonic()
    while True:
        try:
            shown = asyncio.run(_stream(client, job, shown))
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
                asyncio.run(_stream(client, job, shown))
                return str(status.value)
        time.sleep(POLL_SECONDS)


async def _stream(client: Any, job: str, shown: int) -> int:
    """Print what the job printed beyond the first `shown` characters, until it ends or the connection does."""
    passed = 0
    async for chunk in client.tail_job_logs(job):
        new = chunk[max(0, shown - passed) :]
        passed += len(chunk)
        if new:
            sys.stderr.write(printable(new))
            sys.stderr.flush()
            shown = passed
    return shown
