"""The journal survives torn lines, killed writers, full disks and replays; damaged files around it are reported."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.config.errors import ConfigError, TrackingError
from pipeline.config.urls import local_path
from pipeline.data.storage import Storage
from pipeline.tracking import lease
from pipeline.tracking.journal import Journal, encode, parse_records
from pipeline.tracking.locations import journal_folder, read_journal, read_run_id
from pipeline.tracking.mlflow_replay import Cursor, pending_bytes
from pipeline.tracking.tracker import History, Tracker
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.journals import STAGE_START, artifact, config_of, point, steps, training

END = encode({"kind": "run_end", "at": 1, "stage": None, "status": "FINISHED"})
TAG = {"kind": "tag", "at": 1, "stage": None, "key": "a", "value": "b"}
SERVER = "http://server"


def test_records_are_read_back_with_their_offsets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    training(journal, 1, 2).close()
    (session,) = journal.sessions()
    read = list(journal.records(session))
    assert [record for _, record in read] == [STAGE_START, point(1), point(2)]
    assert [record for _, record in journal.records(session, read[1][0])] == [point(2)]
    assert read[-1][0] == journal.path(session).stat().st_size
    parsed = parse_records([END, b"\x00\x00\x00\n", END], "a session")
    assert [record["kind"] for _, record in parsed] == ["run_end", "damaged", "run_end"]
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
    for name in ("/abs/x", "../x", "a/../../x", "a//b", "", ".", "a/..", "a\0b", "x" * 2000, "a\\..\\b"):
        ((_, record),) = parse_records([encode(artifact(name=name))], "a session")
        assert record["kind"] == "damaged", f"{name!r} leaves MLflow's artifact folder"


def test_a_killed_writer_loses_no_appended_record(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pipeline.tracking.journal import Journal, JournalWriter\n"
        "writer = JournalWriter(Journal(Path(sys.argv[1])))\n"
        "for step in range(500): writer.append({'kind': 'metrics', 'at': 0, 'stage': 0, 'step': step, 'values': {}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert (done.returncode, steps(Journal(tmp_path))) == (-signal.SIGKILL, list(range(500)))


def test_a_full_disk_delays_records_and_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, real_write = Journal(tmp_path), os.write
    writer = training(journal, 1, 1)
    left = [7]  # bytes that still fit

    def write(descriptor: int, data: bytes) -> int:
        if not left:
            raise OSError(28, "No space left on device")
        return real_write(descriptor, data[: left.pop()])

    monkeypatch.setattr(os, "write", write)
    writer.append(point(2))
    writer.append(point(3))
    monkeypatch.setattr(os, "write", real_write)
    writer.append(point(4))
    assert steps(journal) == [1, 2, 3, 4]


def test_heartbeats_replace_missing_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, os.strerror(37))))
    journal = Journal(tmp_path)
    writer = training(journal, 1, 3)
    path = journal.path(journal.sessions()[0])
    assert "no file locks" in caplog.text
    assert lease.is_held(path)
    with monkeypatch.context() as context:
        context.setattr(lease, "_held", set())  # as another process sees it
        assert lease.is_held(path, elsewhere=True)
        os.utime(f"{path}.heartbeat", (1, 1))
        assert not lease.is_held(path, elsewhere=True), "its process has died"
    writer.close()
    assert not lease.is_held(path)
    assert steps(journal) == [1, 2, 3]
    assert not list(tmp_path.glob("*.heartbeat"))
    for _ in range(2):
        with closing(lease.Lease(journal.upload_lock)), pytest.raises(lease.InUse):
            lease.Lease(journal.upload_lock)


def test_replayed_steps_and_evaluations_are_filtered(tmp_path: Path) -> None:
    history = History(Journal(tmp_path))
    for step in (10, 20, 30):
        history.keep_new(0, step, {"loss": 1.0})
    replay = {step: history.keep_new(0, step, {"loss": 1.0}) for step in (7, 14, 21, 28, 35)}
    assert [step for step, values in replay.items() if values] == [35], "at any logging interval"
    assert history.keep_new(1, 7, {"loss": 1.0}) == {"loss": 1.0}, "stages are independent"
    assert history.keep_new(0, 30, {"lr": 0.1, "loss": 1.0}) == {"lr": 0.1}, "keys recorded later are kept"
    for step, value, is_new in ((500, 0.5, True), (100, 0.1, True), (500, 0.5, False), (500, 0.6, True)):
        assert bool(history.keep_new(None, step, {"eval/r1": value})) == is_new


# ---- locations, and the files next to the journal


def test_a_folder_that_cannot_be_written_is_reported_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    storage, folder = Storage(), "memory://places/runs/run"
    storage.write(f"{folder}/journal/000001-ab.jsonl", b'{"kind":"tag"}\n')
    for cache in ("file", "file/below", "/proc/none"):
        monkeypatch.setenv("MOME_CACHE", str(tmp_path / cache))
        with pytest.raises(TrackingError, match="MOME_CACHE"):
            read_journal(folder, storage)
        with pytest.raises(TrackingError, match="MOME_CACHE"):
            Tracker.open(config_of("memory://places/runs"), storage)
    storage.delete("memory://places")
    for variable in ("HOME", "MOME_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError("no such user")))
    with pytest.raises(TrackingError, match="MOME_CACHE"):
        journal_folder("s3://bucket/runs/run")
    with pytest.raises(ConfigError, match="HOME"):
        local_path("~/runs")


def test_a_damaged_run_id_is_rejected_by_name(tmp_path: Path) -> None:
    config, storage, rng = config_of(tmp_path), Storage(), random.Random(6)
    whole = json.dumps({"run": "f" * 32, "name": "run"}).encode()
    extreme = [b"", b"[]", b"1", b'{"run": 5}', b'{"run": "a\' or 1"}', b"[" * 100_000, b'"run"', b"{}"]
    for data in extreme:
        storage.write(f"{config.folder}/tracking.json", data)
        with pytest.raises(TrackingError, match=r"(?s)tracking.json is damaged.*restore it"):
            read_run_id(config, storage)
    for data in [whole, *(mutate(whole, rng) for _ in range(fuzz_rounds(300)))]:
        storage.write(f"{config.folder}/tracking.json", data)
        with suppress(TrackingError) if data != whole else nullcontext():
            assert re.fullmatch(r"[\w.-]{1,64}", read_run_id(config, storage) or "", re.ASCII)


def test_a_damaged_cursor_only_repeats_the_upload(tmp_path: Path) -> None:
    rng, journal = random.Random(7), Journal(tmp_path)
    training(journal, 0, 2).close()
    (session,) = journal.sessions()
    whole = journal.path(session).read_bytes()
    ends = {0} | {number + 1 for number, byte in enumerate(whole) if byte == 10}
    cursor = Cursor.load(tmp_path, SERVER)
    cursor.marks = {"0": {"train/loss": 7}}
    for offset in range(len(whole) + 10):  # an impossible offset repeats the whole session
        cursor.offsets = {session: offset}
        cursor.save()
        assert Cursor.load(tmp_path, SERVER).offsets == {session: offset}
        assert pending_bytes(tmp_path, SERVER) == len(whole) - (offset if offset in ends else 0)
    (path,) = tmp_path.glob("cursor-*.json")
    saved = path.read_bytes()
    extreme = [b"", b"[]", b"1", b'{"offsets": [], "marks": {}}', b'{"offsets": {"a": "b"}, "marks": {}}']
    extreme += [b"[" * 100_000, b'{"offsets": {"a": -5}}', b'{"marks": {"0": {"x": "y"}}}']
    for data in [*extreme, *(mutate(saved, rng) for _ in range(fuzz_rounds(500)))]:
        path.write_bytes(data)
        read = Cursor.load(tmp_path, SERVER)
        assert all(isinstance(offset, int) and offset >= 0 for offset in read.offsets.values())
        assert all(isinstance(step, int) for marks in read.marks.values() for step in marks.values())
        pending_bytes(tmp_path, SERVER)


def test_symbolic_links_in_a_journal_are_not_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "journal"
    victim.write_text("mine")
    folder.mkdir()
    cursor = Cursor.load(folder, SERVER)
    for name in ("uploader.lock", cursor._path.name, cursor._path.with_suffix(".partial").name):
        (folder / name).symlink_to(victim)
    cursor.save()
    with pytest.raises(OSError, match="symbolic links"):
        lease.Lease(Journal(folder).upload_lock)
    assert victim.read_text() == "mine"
