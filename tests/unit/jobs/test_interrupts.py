"""The driver's first signal makes the ranks save, the second ends it at once; it always ends in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import interrupts
from jobs.interrupts import Interrupts, Stopped
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[3]


class Mail:
    """Mailbox to the ranks that counts the requests to save."""

    def __init__(self, takes: bool = True) -> None:
        self.takes, self.asked = takes, 0

    def request_stop(self) -> bool:
        self.asked += 1
        return self.takes


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(ROOT / "configs" / "demo.yaml", [f"output={tmp_path}"])


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(interrupts, "notify", found.append)
    monkeypatch.setattr(interrupts, "END_SECONDS", 1e8)  # the timeout would end the test process
    return found


def test_ranks_are_requested_once_to_save_and_awaited(config: RunConfig, said: list[str]) -> None:
    mail: Any = Mail()
    hears = Interrupts(config)

    def drive() -> None:
        with hears.deferred():
            hears.check(mail, ranks=2)
            hears._on_signal(signal.SIGTERM, None)
            for _ in range(5):
                hears.check(mail, ranks=2)

    with pytest.raises(Stopped):
        drive()
    assert mail.asked == 1
    assert said[0].startswith("SIGTERM: the ranks save")


def test_undelivered_stop_request_is_sent_again(config: RunConfig, said: list[str]) -> None:
    mail: Any = Mail(takes=False)
    hears = Interrupts(config)

    def drive() -> None:
        with hears.deferred():
            hears._on_signal(signal.SIGTERM, None)
            hears.check(mail, ranks=2)
            mail.takes = True
            hears.check(mail, ranks=2)
            hears.check(mail, ranks=2)

    with pytest.raises(Stopped):
        drive()
    assert mail.asked == 2


def test_driver_stops_at_once_before_ranks_are_placed(config: RunConfig, said: list[str]) -> None:
    mail: Any = Mail()
    hears = Interrupts(config)

    def drive() -> None:
        with hears.deferred():
            hears._on_signal(signal.SIGINT, None)
            hears.check(mail, ranks=0)
            pytest.fail("it went on")

    with pytest.raises(Stopped):
        drive()
    assert mail.asked == 0


def test_wait_for_an_unavailable_store_is_bounded(
    config: RunConfig, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "UNREACHABLE_SECONDS", 0.2)
    away = config.model_copy(update={"output": "s3://bucket/runs"})
    away = away.model_copy(update={"storage": away.storage.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    hears, mail = Interrupts(away), Mail()

    def drive() -> None:
        with hears.deferred():
            hears._on_signal(signal.SIGINT, None)
            end = time.monotonic() + 20
            while time.monotonic() < end:
                hears.check(mail, ranks=2)  # type: ignore[arg-type]
                time.sleep(0.05)

    with pytest.raises(Stopped):
        drive()
    assert "has not answered" in said[-1]


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
    ("signals", "end", "hold", "status", "told"),
    [
        ([signal.SIGTERM], 600, 0, 75, "stopped (SIGTERM): no checkpoint yet; re-run the same command to resume"),
        ([signal.SIGINT], 600, 0, 130, "stopped (SIGINT): no checkpoint yet; re-run the same command to resume"),
        ([signal.SIGTERM, signal.SIGINT], 600, 60, 130, "ended at once"),
        ([signal.SIGINT, signal.SIGTERM], 600, 60, 75, "ended at once"),
        ([signal.SIGTERM], 0.5, 60, 75, "ended now"),
    ],
)
def test_driver_ends_although_its_cleanup_hangs(
    signals: list[signal.Signals], end: float, hold: float, status: int, told: str, tmp_path: Path
) -> None:
    with _start(SCRIPT, tmp_path, end, hold) as process:
        assert process.stderr is not None
        for number in signals:
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait(timeout=50) == status
        assert told in process.stderr.read()


def test_main_thread_blocked_in_a_library_is_ended(tmp_path: Path) -> None:
    """Another thread receives the signal, and no Python signal handler runs."""
    blocked = "            signal.pthread_sigmask(signal.SIG_BLOCK, [2, 15])\n            time.sleep(60)\n"
    script = SCRIPT.replace("            time.sleep(60)\n", blocked, 1)
    with _start(script, tmp_path, 0.5, 0) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=50) == 130


def test_unavailable_store_does_not_delay_the_end() -> None:
    keys = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with _start(SCRIPT, "s3://bucket/runs", 600, 0, **keys) as process:
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
