"""An upload process that cannot start is reported once and restarted slowly."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from pipeline.tracking.journal import Journal
from pipeline.tracking.uploader import Uploader
from tests.support.journals import config_of


@pytest.mark.parametrize(
    "script", ["echo 'ImportError: mlflow from http://me:hunter2@index is broken' >&2; exit 1", "exit 7", "absent"]
)
def test_a_failing_process_is_reported_once_and_restarted_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    program = tmp_path / "python"
    if script != "absent":
        program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/starts\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setattr("pipeline.tracking.uploader.sys.executable", str(program))
    caplog.set_level(logging.WARNING)
    config = config_of(tmp_path, flush_seconds=0.02)
    journal = Journal(tmp_path / "journal")
    writer = journal.start_session()
    uploader = Uploader(journal, writer, config)
    time.sleep(1.0)
    uploader.close(5.0)
    writer.close()

    reports = [message for message in caplog.messages if "the process that uploads to MLflow" in message]
    assert len(reports) == 1
    assert "uploader.log" in reports[0]
    assert "hunter2" not in caplog.text
    assert len((tmp_path / "starts").read_text().splitlines() if script != "absent" else []) <= 8
