"""Unusable locations of a run's records and damaged files there are reported in one message."""

from __future__ import annotations

import json
import os
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError, TrackingError
from pipeline.config.urls import local_path
from pipeline.data.storage import Storage
from pipeline.tracking.journal import Journal
from pipeline.tracking.locations import journal_folder, read_journal, read_run_id
from pipeline.tracking.mlflow_replay import Cursor, exclusive_upload, pending_bytes
from pipeline.tracking.tracker import Tracker
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.journals import config_of, training


def test_without_a_home_the_error_names_the_cache_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("MOME_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))

    with pytest.raises(TrackingError, match="MOME_CACHE"):
        journal_folder("s3://bucket/runs/run")
    with pytest.raises(ConfigError, match="HOME"):
        local_path("~/runs")


@pytest.mark.parametrize("cache", ["file", "file/below", "/proc/none"])
def test_an_unwritable_cache_is_reported_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MOME_CACHE", str(tmp_path / cache))
    storage, folder = Storage(), "memory://places/runs/run"
    storage.write(f"{folder}/journal/000001-ab.jsonl", b'{"kind":"tag"}\n')

    with pytest.raises(TrackingError, match="MOME_CACHE"):
        read_journal(folder, storage)
    with pytest.raises(TrackingError, match="MOME_CACHE"):
        Tracker.open(config_of("memory://places/runs"), storage)
    storage.delete("memory://places")


def test_a_damaged_run_id_is_rejected_by_name(tmp_path: Path) -> None:
    config, storage, rng = config_of(tmp_path), Storage(), random.Random(6)
    whole = json.dumps({"run": "f" * 32, "name": "run"}).encode()
    extreme = [b"", b"[]", b"1", b'{"run": 5}', b'{"run": "a\' or 1"}', b"[" * 100_000, b'"run"']
    for data in [*extreme, *(mutate(whole, rng) for _ in range(fuzz_rounds(300)))]:
        storage.write(f"{config.folder}/tracking.json", data)
        with suppress(TrackingError):
            assert re.fullmatch(r"[\w.-]{1,64}", read_run_id(config, storage) or "", re.ASCII)
            continue
        assert data != whole
    storage.write(f"{config.folder}/tracking.json", b"{}")
    with pytest.raises(TrackingError, match=r"tracking.json is damaged.*restore it"):
        read_run_id(config, storage)


def test_a_damaged_cursor_only_repeats_the_upload(tmp_path: Path) -> None:
    rng = random.Random(7)
    cursor = Cursor.load(tmp_path, "http://server")
    cursor.offsets, cursor.marks = {"000001-ab": 500}, {"0": {"train/loss": 7}}
    cursor.save()
    (path,) = tmp_path.glob("cursor-*.json")
    whole = path.read_bytes()
    assert Cursor.load(tmp_path, "http://server").offsets == {"000001-ab": 500}
    extreme = [b"", b"[]", b"1", b'{"offsets": [], "marks": {}}', b'{"offsets": {"a": "b"}, "marks": {}}']
    extreme += [b"[" * 100_000, b'{"offsets": {"a": -5}}', b'{"marks": {"0": {"x": "y"}}}']
    for data in [*extreme, *(mutate(whole, rng) for _ in range(fuzz_rounds(500)))]:
        path.write_bytes(data)
        read = Cursor.load(tmp_path, "http://server")
        assert all(isinstance(offset, int) and offset >= 0 for offset in read.offsets.values())
        assert all(isinstance(step, int) for marks in read.marks.values() for step in marks.values())
        pending_bytes(tmp_path, "http://server")


def test_an_impossible_cursor_repeats_the_whole_session(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    training(journal, 0, 2).close()
    (session,) = journal.sessions()
    whole = journal.path(session).read_bytes()
    ends = {0} | {number + 1 for number, byte in enumerate(whole) if byte == 10}
    for offset in range(len(whole) + 10):
        cursor = Cursor.load(tmp_path, "http://server")
        cursor.offsets = {session: offset}
        cursor.save()

        assert pending_bytes(tmp_path, "http://server") == len(whole) - (offset if offset in ends else 0)


def test_symbolic_links_in_a_journal_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "journal"
    folder.mkdir()
    cursor = Cursor.load(folder, "http://server")
    for name in ("uploader.lock", cursor._path.name, cursor._path.with_suffix(".partial").name):
        (folder / name).symlink_to(victim)
    cursor.save()
    with pytest.raises(OSError), exclusive_upload(folder):  # noqa: PT011
        pass

    assert victim.read_text() == "mine"


def test_one_process_uploads_without_file_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with exclusive_upload(tmp_path) as first, exclusive_upload(tmp_path) as second:
        assert (first, second) == (True, False)
    with exclusive_upload(tmp_path) as later:
        assert later
