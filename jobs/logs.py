"""Output of a submitted job, streamed until the job ends; a broken connection is re-established."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from jobs.dashboard import first_line
from pipeline.config.errors import RunFailed
from pipeline.config.redaction import printable

UNREACHABLE_SECONDS = 120.0  # how long the dashboard may be unreachable
SILENT_SECONDS = 60.0  # without output, after which the status is requested: a dead connection is silent too
POLL_SECONDS = 2.0


def stream_logs(client: Any, job: str) -> str:
    """Stream a job's output to standard error; return the status it ended with.

    Raises RunFailed when the cluster is unreachable for `UNREACHABLE_SECONDS`.
    """
    output, last_reached = _Output(), time.monotonic()
    while True:
        try:
            asyncio.run(output.show(client, job))
            status = client.get_job_status(job)
        except KeyboardInterrupt:
            raise
        except Exception as error:  # HTTP and websocket libraries raise many types when a head goes away
            if time.monotonic() - last_reached > UNREACHABLE_SECONDS:
                raise RunFailed(
                    f"job {job}: the cluster has not answered for {UNREACHABLE_SECONDS:.0f} s ({first_line(error)}). "
                    "If its head is lost, submit again to the new one: the run resumes."
                ) from error
        else:
            last_reached = time.monotonic()
            if status.is_terminal():
                asyncio.run(output.show(client, job))
                return str(status.value)
        time.sleep(POLL_SECONDS)


class _Output:
    """Writer that shows each character of a job's output once, however often the connection breaks."""

    def __init__(self) -> None:
        self._num_shown = 0

    async def show(self, client: Any, job: str) -> None:
        """Print new output until the job or the connection ends, or no output came for `SILENT_SECONDS`."""
        num_received = 0
        chunks = client.tail_job_logs(job)
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), SILENT_SECONDS)
            except (StopAsyncIteration, TimeoutError):
                return
            new = chunk[max(0, self._num_shown - num_received) :]
            num_received += len(chunk)
            if new:
                sys.stderr.write(printable(new))
                sys.stderr.flush()
                self._num_shown = num_received
