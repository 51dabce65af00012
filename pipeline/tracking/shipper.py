"""The process that ships a journal to MLflow, started and minded by the process that writes the journal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time

from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig
from pipeline.tracking.journal import Journal, JournalWriter
from pipeline.tracking.places import tracking_uri

logger = logging.getLogger("mome.tracking")

_LAST_WORDS = 4096  # bytes of the process's log in which its last line is looked for


class Shipper:
    """The process that ships the journal, and the thread that minds it and syncs the journal to disk in batches."""

    _LONGEST_REST = 60.0

    def __init__(self, journal: Journal, writer: JournalWriter, config: RunConfig):
        self._journal = journal
        self._writer = writer
        self._every = config.tracking.flush_seconds
        self._uri = tracking_uri(config)
        self._log = journal.folder / "shipper.log"
        self._stop = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._minder = threading.Thread(target=self._mind, name="mome-tracking", daemon=True)
        self._minder.start()

    def wake(self) -> None:
        self._tell("ship")

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._stop.set()
        self._minder.join(timeout)
        process = self._process
        if process is None or not self._finish(process, deadline):
            logger.warning(
                "%s did not take the whole journal in %.0f s; it is kept in %s: ship it later with `mome sync`",
                redact(self._uri), timeout, self._journal.folder,
            )  # fmt: skip

    def abandon(self) -> None:
        """End the process, whatever is not shipped yet."""
        self._stop.set()
        self._minder.join()
        process = self._process  # which the minder may have started just now
        if process is not None:
            process.kill()
            process.wait()

    def _finish(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        self._tell(f"close {0.9 * max(deadline - time.monotonic(), 0.0):.3f}")
        try:
            return process.wait(max(deadline - time.monotonic(), 0.0)) == 0
        except subprocess.TimeoutExpired:
            process.kill()  # shipping again what it had begun changes nothing
            process.wait()
            return False
        finally:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it ended before it read everything
                process.stdin.close()

    def _mind(self) -> None:
        """Sync the journal every `flush_seconds`; start the process again when it ended, each time a while later."""
        started, rest, reported = time.monotonic(), self._every, False
        self._start()
        while not self._stop.wait(self._every):
            try:
                self._writer.sync()
            except OSError as error:
                logger.warning("tracking: the journal cannot be synced (%s)", error)
            now = time.monotonic()
            if self._process is not None and self._process.poll() is None:
                if now - started > self._LONGEST_REST:  # it works
                    rest, reported = self._every, False
                continue
            if not reported:
                logger.warning("tracking: %s", self._why_it_ended())
                reported = True
            if now - started >= rest:
                started, rest = now, min(2 * rest, self._LONGEST_REST)
                self._start()

    def _why_it_ended(self) -> str:
        status = "did not start" if self._process is None else f"ended with status {self._process.returncode}"
        said: list[str] = []
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(max(self._log.stat().st_size - _LAST_WORDS, 0))
            said = log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        return (
            f"the process that ships to MLflow {status} ({redact(last)}; see {self._log}). It is started again and "
            "again; the journal keeps everything, and `mome sync` ships it later"
        )

    def _start(self) -> None:
        """Start the shipping process. It ends when its input closes, so it cannot outlive this process for long."""
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "pipeline.tracking.mlflow_process", str(self._journal.folder)]
        try:
            # No link is followed: the journal's folder may have been made by somebody else.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(self._log, flags, 0o644), "ab") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                    start_new_session=True,  # Ctrl-C ends training, which then closes this process in order
                )  # fmt: skip
        except OSError as error:
            logger.warning("tracking: the shipping process did not start (%s); the journal is kept", error)
            return
        # Through its input, not its arguments: the URI may hold a password, and arguments are seen by everybody.
        self._tell(json.dumps({"uri": self._uri, "every": self._every}))
        threading.Thread(target=_relay, args=(self._process,), daemon=True).start()

    def _tell(self, line: str) -> None:
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # it has ended; `_mind` starts another
            pass


def _relay(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        logger.warning("%s", line.decode(errors="replace").rstrip())
