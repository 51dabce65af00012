"""The driver's first signal makes the ranks save, the second ends it at once; it always ends in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jobs import interrupts
from jobs.interrupts import Interrupts, Stopped
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[3]


class Mail:
    """Mailbox to the ranks that counts the requests to save, and accepts those after the first `lost`."""

    def __init__(self, lost: int = 0) -> None:
        self.lost, self.requests = lost, 0

    def put(self, name: str, value: object) -> bool:
        self.requests += 1
        return self.requests > self.lost


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(ROOT / "configs" / "demo.yaml", [f"output={tmp_path}"])


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(interrupts, "notify", messages.append)
    monkeypatch.setattr(interrupts, "END_SECONDS", 1e8)  # the timeout would end the test process
    return messages


def drive(config: RunConfig, mail: Any, ranks: int, seconds: float = 0.0) -> None:
    """Send SIGTERM to a driver, and check five times, or for some seconds."""
    handlers, end = Interrupts(config), time.monotonic() + seconds
    with suppress(Stopped):
        with handlers.deferred():
            handlers.check(mail, ranks)
            handlers._on_signal(signal.SIGTERM, None)
            for _ in range(5):
                handlers.check(mail, ranks)
            while time.monotonic() < end:
                handlers.check(mail, ranks)
                time.sleep(0.05)
        pytest.fail("the driver went on after a signal")


@pytest.mark.parametrize("lost", [0, 1])
def test_ranks_are_requested_to_save_until_they_receive_it(config: RunConfig, printed: list[str], lost: int) -> None:
    mail = Mail(lost)
    drive(config, mail, ranks=2)
    assert mail.requests == lost + 1
    assert [message.partition(" after")[0] for message in printed] == ["SIGTERM: the ranks save"]


def test_driver_stops_at_once_before_ranks_are_placed(config: RunConfig, printed: list[str]) -> None:
    mail, started = Mail(), time.monotonic()
    drive(config, mail, ranks=0, seconds=60)
    assert mail.requests == 0
    assert time.monotonic() - started < 30


def test_wait_for_an_unavailable_store_is_bounded(
    config: RunConfig, printed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "UNREACHABLE_SECONDS", 0.2)
    for name, value in AWAY.items():
        monkeypatch.setenv(name, value)
    drive(config.model_copy(update={"output": "s3://bucket/runs"}), Mail(), ranks=2, seconds=20)
    assert "has not answered" in printed[-1]


AWAY = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from jobs import interrupts
from pipeline.config.load import load_config

interrupts.END_SECONDS, interrupts.ANSWER_SECONDS = float(sys.argv[2]), 0.2
try:
    with interrupts.Interrupts(load_config(Path("configs/demo.yaml"), [f"output={sys.argv[1]}"])):
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep(float(sys.argv[3]))  # a store that is away
except interrupts.Stopped as stopped:
    sys.stderr.flush()
    os._exit(stopped.exit_status)
"""


@pytest.mark.parametrize(
    ("signals", "end", "hold", "status", "message"),
    [
        ([signal.SIGTERM], 600, 0, 75, "stopped (SIGTERM): no checkpoint yet; re-run the same command to resume"),
        ([signal.SIGINT], 600, 0, 130, "stopped (SIGINT): no checkpoint yet; re-run the same command to resume"),
        ([signal.SIGTERM, signal.SIGINT], 600, 60, 130, "ended at once"),
        ([signal.SIGINT, signal.SIGTERM], 600, 60, 75, "ended at once"),
        ([signal.SIGTERM], 0.5, 60, 75, "ended now"),
    ],
)
def test_driver_ends_although_its_cleanup_hangs(
    signals: list[signal.Signals], end: float, hold: float, status: int, message: str, tmp_path: Path
) -> None:
    with _start(SCRIPT, tmp_path, end, hold) as process:
        assert process.stderr is not None
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait(timeout=50) == status
        assert message in process.stderr.read()


def test_main_thread_blocked_in_a_library_is_ended(tmp_path: Path) -> None:
    """Another thread receives the signal, and no Python signal handler runs."""
    blocked = "            signal.pthread_sigmask(signal.SIG_BLOCK, [2, 15])\n            time.sleep(60)\n"
    script = SCRIPT.replace("            time.sleep(60)\n", blocked, 1)
    with _start(script, tmp_path, 0.5, 0) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=50) == 130


def test_unavailable_store_does_not_delay_the_end() -> None:
    with _start(SCRIPT, "s3://bucket/runs", 600, 0, **AWAY) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=50) == 130
        assert process.stderr is not None
        assert "the store does not answer; re-run" in process.stderr.read()


def _start(script: str, output: Path | str, end: float, hold: float, **more: str) -> subprocess.Popen[str]:
    """Start a driver and wait until its signal handlers are installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    command = [sys.executable, "-c", script, str(output), str(end), str(hold)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process
