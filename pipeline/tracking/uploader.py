"""Upload of a journal to MLflow, and to TensorBoard's files, by a separate process, which `Uploader` starts.

The two talk over the child's standard input and output: one JSON line with its settings, then 'upload' or
'close SECONDS'; the child prints messages for the recording process's log.
"""

import contextlib
import json
import logging
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.background import PeriodicThread
from pipeline.config.errors import ConfigError
from pipeline.config.redaction import configure_logging, describe_error, redact, remember
from pipeline.config.schema import RunConfig
from pipeline.tracking.journal import UPLOAD_LOCK, InUse, Journal, JournalWriter, Lease
from pipeline.tracking.locations import tracking_uri
from pipeline.tracking.mlflow_replay import MlflowUploader, pending_bytes
from pipeline.tracking.mlflow_server import ServerUnavailable
from pipeline.tracking.tensorboard import EventFiles, tensorboard_folder

logger = logging.getLogger("mome.tracking")

MAX_RESTART_SECONDS = 60.0  # between two starts of a child that keeps ending
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 30.0  # between two attempts while the server is unavailable
ORPHAN_SECONDS = 30.0  # for uploading the rest after the recording process has died


class Uploader:
    """Runs the upload process, restarts it when it ends, and syncs the journal to disk every `flush_seconds`."""

    def __init__(self, journal: Journal, writer: JournalWriter, config: RunConfig):
        self._journal, self._writer, self._uri = journal, writer, tracking_uri(config)
        self._every, self._log = config.tracking.flush_seconds, journal.folder / "uploader.log"
        self._tensorboard = tensorboard_folder(config)
        self._process: subprocess.Popen[bytes] | None = None
        self._last_start, self._restart_seconds, self._reported = float("-inf"), 0.0, False
        self._thread = PeriodicThread(self._supervise, self._every, "mome-tracking", immediately=True)
        self._thread.start()

    def send(self, command: str) -> None:
        """Send a command to the process, if it runs."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # the process has ended and will be restarted
                self._process.stdin.write(command.encode() + b"\n")
                self._process.stdin.flush()

    def close(self, timeout: float | None) -> None:
        """End the process once everything is uploaded, after at most `timeout` seconds; None kills it at once."""
        deadline = time.monotonic() + (timeout or 0.0)
        self._thread.stop(timeout)
        is_complete = timeout is None
        if (process := self._process) is not None:
            self.send(f"close {0.9 * max(deadline - time.monotonic(), 0.0):.3f}")
            try:
                is_complete |= process.wait(max(deadline - time.monotonic(), 0.0)) == 0
            except subprocess.TimeoutExpired:
                process.kill()  # uploads are idempotent, so an interrupted one does no harm
                process.wait()
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # the process ended before it had read everything
                process.stdin.close()
        if not is_complete:
            message = "%s did not accept the whole journal within %.0f s; it is kept in %s: upload it with `mome sync`"
            logger.warning(message, redact(self._uri), timeout, self._journal.folder)

    def _supervise(self) -> None:
        """Sync the journal, and restart the process if it has ended, waiting twice as long after each failure."""
        if self._last_start > 0:
            try:
                self._writer.sync()
            except OSError as error:
                logger.warning("tracking: the journal cannot be synced (%s)", error)
        now, process = time.monotonic(), self._process
        if process is not None and process.poll() is None:
            if now - self._last_start > MAX_RESTART_SECONDS:  # the process works
                self._restart_seconds, self._reported = self._every, False
            return
        if self._last_start > 0 and not self._reported:
            status = "did not start" if process is None else f"ended with status {process.returncode}"
            reason = ""  # the last line of its log
            with contextlib.suppress(OSError), self._log.open("rb") as log:
                log.seek(max(self._log.stat().st_size - 4096, 0))
                reason = log.read().decode(errors="replace").strip().rpartition("\n")[2]
            logger.warning(
                "tracking: the process that uploads to MLflow %s (%s; see %s). It will be restarted; the "
                "journal keeps every record, and `mome sync` can upload it later",
                status, redact(reason.strip() or "no output"), self._log,
            )  # fmt: skip
            self._reported = True
        if now - self._last_start < self._restart_seconds:
            return
        self._last_start = now
        self._restart_seconds = min(max(2 * self._restart_seconds, self._every), MAX_RESTART_SECONDS)
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)), OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "pipeline.tracking.uploader", str(self._journal.folder)]
        try:
            # No symbolic link is followed, because another user may have created the journal's folder.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(self._log, flags, 0o644), "ab") as log:
                # Ctrl-C ends training, which then closes this process in order: it gets a session of its own. It ends
                # soon after its input is closed, and so cannot outlive this process.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                    start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            logger.warning("tracking: the upload process did not start (%s); the journal is kept", error)
            return
        # Sent through the input, because the URI may hold a password and arguments are visible to other users.
        events = None if self._tensorboard is None else str(self._tensorboard)
        self.send(json.dumps({"uri": self._uri, "every": self._every, "tensorboard": events}))
        threading.Thread(target=_forward_messages, args=(self._process.stdout,), daemon=True).start()


def _forward_messages(lines: Iterable[bytes]) -> None:
    for line in lines:
        logger.warning("%s", line.decode(errors="replace").rstrip())


@dataclass
class UploadProcess:
    """Uploads a journal until its input has a command to close or ends, or its parent process changes (died)."""

    folder: Path
    channel: int  # file descriptor of messages for the recording process
    uri: str
    every: float  # seconds
    tensorboard: str | None = None  # folder of TensorBoard's event files
    _parent: int = field(default_factory=os.getppid)
    _buffer: bytes = b""
    _deadline: float = math.inf  # until a command to close

    def run(self) -> bool:
        """Upload the journal every `every` seconds until a close command; return True if nothing is left."""
        with contextlib.ExitStack() as lock:
            while True:
                try:
                    lock.enter_context(contextlib.closing(Lease(self.folder / UPLOAD_LOCK)))
                    break
                except InUse:  # the uploader of an earlier start, or of an evaluation; it uploads these records too
                    is_late, is_closing = time.monotonic() >= self._deadline, self._deadline < math.inf
                    if is_closing and (is_late or not pending_bytes(self.folder, self.uri)):
                        return not pending_bytes(self.folder, self.uri)
                    self._wait(1.0)
            uploader, server = MlflowUploader(self.folder, self.uri, self._report), redact(self.uri)
            events = self._open_event_files()
            retry_seconds, down_since = RETRY_SECONDS, 0.0
            while True:
                is_closing = self._deadline < math.inf
                events = events and self._write_events(events)
                try:
                    uploader.upload()
                except ServerUnavailable as error:
                    if not down_since:
                        down_since = time.monotonic()
                        message = f"tracking: {server} is unavailable; records are kept and sent later ({error})"
                        self._report(message[:500])
                        logger.warning("the upload waits", exc_info=error)
                    self._wait(retry_seconds)
                    retry_seconds = min(2 * retry_seconds, MAX_RETRY_SECONDS)
                else:
                    if down_since:
                        seconds = time.monotonic() - down_since
                        self._report(f"tracking: {server} is available again after {seconds:.0f} s; nothing was lost")
                    retry_seconds, down_since = RETRY_SECONDS, 0.0
                    if is_closing:
                        return True
                    self._wait(self.every)
                if time.monotonic() >= self._deadline:
                    return not pending_bytes(self.folder, self.uri)

    def _open_event_files(self) -> EventFiles | None:
        try:
            return None if self.tensorboard is None else EventFiles(Journal(self.folder), Path(self.tensorboard))
        except ConfigError as error:
            self._report(f"tracking: no TensorBoard files are written: {error}")
            return None

    def _write_events(self, events: EventFiles) -> EventFiles | None:
        """Write TensorBoard's files; return None after an error, which must not stop the upload."""
        try:
            events.write()
            return events
        except Exception as error:
            sync = "`mome sync RUN --tensorboard FOLDER` writes them later"
            self._report(f"tracking: TensorBoard's files are not written any more ({describe_error(error)}); {sync}")
            logger.warning("TensorBoard's files are not written any more", exc_info=error)
            return None

    def _report(self, message: str) -> None:
        with contextlib.suppress(OSError):  # the recording process may have ended
            os.write(self.channel, " ".join(message.split()).encode() + b"\n")

    def _wait(self, seconds: float) -> None:
        """Wait for a command, at most `seconds`."""
        if self._deadline < math.inf:
            time.sleep(max(0.0, min(seconds, 0.5, self._deadline - time.monotonic())))
        elif select.select([sys.stdin], [], [], seconds)[0]:
            data = os.read(sys.stdin.fileno(), 65536)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            closing = [line for line in lines if line.startswith(b"close ")]
            if closing or not data:
                self._deadline = time.monotonic() + (float(closing[0].split()[1]) if closing else ORPHAN_SECONDS)
        elif os.getppid() != self._parent:
            self._deadline = time.monotonic() + ORPHAN_SECONDS


def main() -> int:
    """Upload the journal in the folder argv[1]; return 0 if everything was uploaded, 3 if not, 1 after an error."""
    os.nice(10)  # training has priority
    with open(0, "rb", buffering=0, closefd=False) as channel:  # `UploadProcess` reads the rest
        line = channel.readline()
    if not line:
        return 1
    settings, messages = json.loads(line), os.dup(1)
    os.dup2(2, 1)  # all other output goes to the log
    configure_logging()
    remember(settings["uri"])
    try:
        return 0 if UploadProcess(Path(sys.argv[1]), messages, **settings).run() else 3
    except Exception as error:
        logger.exception("the upload stopped")
        print(describe_error(error), file=sys.stderr)  # the log's last line, without passwords that libraries quote
        return 1


if __name__ == "__main__":
    sys.exit(main())
