"""The journal survives torn lines, killed writers, full disks and replays."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking import lease
from pipeline.tracking.journal import Journal, encode, parse_records
from pipeline.tracking.tracker import History
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.journals import STAGE_START, artifact, point, steps, training

END = encode({"kind": "run_end", "at": 1, "stage": None, "status": "FINISHED"})
TAG = {"kind": "tag", "at": 1, "stage": None, "key": "a", "value": "b"}


def test_records_are_read_back_with_their_offsets(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    training(journal, 1, 2).close()
    (session,) = journal.sessions()

    read = list(journal.records(session))

    assert [record for _, record in read] == [STAGE_START, point(1), point(2)]
    assert [record for _, record in journal.records(session, read[1][0])] == [point(2)]
    assert read[-1][0] == journal.path(session).stat().st_size


def test_a_damaged_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [END, b"\x00\x00\x00\n", END]

    assert [record["kind"] for _, record in parse_records(lines, "a session")] == ["run_end", "damaged", "run_end"]
    assert "damaged" in caplog.text


def test_mutated_sessions_yield_valid_or_damaged_records() -> None:
    rng = random.Random(4)
    session = b"".join(encode(record) for record in (STAGE_START, point(1), artifact(), TAG, point(2)))
    for _ in range(fuzz_rounds(2000)):
        for _, record in parse_records(io.BytesIO(mutate(session, rng)), "a session"):
            json.dumps(record).encode()
            assert record["kind"] == "damaged" or isinstance(record["at"], int)
            assert record["stage"] is None or 0 <= record["stage"] < 10_000
            if record["kind"] == "artifact":
                assert ".." not in record["file"].split("/")
                assert not record["name"].startswith("/")


@pytest.mark.parametrize(
    "name", ["/abs/x", "../x", "a/../../x", "a//b", "", ".", "a/..", "a\0b", "x" * 2000, "a\\..\\b"]
)
def test_artifact_names_stay_inside_mlflows_folder(name: str) -> None:
    ((_, record),) = parse_records([encode(artifact(name=name))], "a session")
    assert record["kind"] == "damaged"


def test_a_killed_writer_loses_no_appended_record(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from pipeline.tracking.journal import Journal\n"
        "writer = Journal(Path(sys.argv[1])).start_session()\n"
        "for step in range(500): writer.append({'kind': 'metrics', 'at': 0, 'stage': 0, 'step': step, 'values': {}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )

    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)

    assert done.returncode == -signal.SIGKILL
    assert steps(Journal(tmp_path)) == list(range(500))


def test_a_full_disk_delays_records_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    writer = training(journal, 1, 1)
    real_write = os.write

    def half_then_full(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr(os, "write", full)
        return real_write(descriptor, data[:7])

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    writer.append(point(2))
    writer.append(point(3))
    monkeypatch.setattr(os, "write", real_write)
    writer.append(point(4))

    assert steps(journal) == [1, 2, 3, 4]


def test_heartbeats_replace_missing_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr("fcntl.flock", no_locks)
    journal = Journal(tmp_path)
    writer = training(journal, 1, 3)
    path = journal.path(journal.sessions()[0])

    assert "no file locks" in caplog.text
    assert lease.is_held(path)
    monkeypatch.setattr(lease, "_held", set())  # as another process sees it
    assert lease.is_held(path, elsewhere=True)
    os.utime(f"{path}.heartbeat", (1, 1))
    assert not lease.is_held(path, elsewhere=True), "its process has died"
    writer.close()
    assert not lease.is_held(path)
    assert steps(journal) == [1, 2, 3]
    assert not list(tmp_path.glob("*.heartbeat"))


def test_replayed_steps_are_filtered_at_any_logging_interval(tmp_path: Path) -> None:
    replay_filter = History(Journal(tmp_path))
    for step in (10, 20, 30):
        replay_filter.keep_new(0, step, {"loss": 1.0})

    replay = {step: replay_filter.keep_new(0, step, {"loss": 1.0}) for step in (7, 14, 21, 28, 35)}

    assert [step for step, values in replay.items() if values] == [35]
    assert replay_filter.keep_new(1, 7, {"loss": 1.0}) == {"loss": 1.0}, "stages are independent"
    assert replay_filter.keep_new(0, 30, {"lr": 0.1, "loss": 1.0}) == {"lr": 0.1}, "keys recorded later are kept"


def test_only_repeated_evaluations_are_filtered(tmp_path: Path) -> None:
    replay_filter = History(Journal(tmp_path))
    for step, value, is_new in ((500, 0.5, True), (100, 0.1, True), (500, 0.5, False), (500, 0.6, True)):
        assert bool(replay_filter.keep_new(None, step, {"eval/r1": value})) == is_new
