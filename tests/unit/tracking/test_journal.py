"""The journal survives torn lines and replays, and its copy lets a run resume on another node."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.storage import ObjectInfo
from pipeline.tracking.committed import CommittedJournal
from pipeline.tracking.journal import Journal, JournalWriter, ReplayFilter, encode, encode_number

END = encode({"kind": "run_end", "at": 1, "stage": None, "status": "FINISHED"})
REPORT = "0123456789abcdef/report.html"


class FolderStore:
    """Object store in a folder."""

    def __init__(self, root: Path):
        self.root = root

    def read(self, url: str) -> bytes:
        return (self.root / url).read_bytes()

    def write(self, url: str, data: bytes) -> None:
        (self.root / url).parent.mkdir(parents=True, exist_ok=True)
        (self.root / url).write_bytes(data)

    def list_info(self, url: str) -> dict[str, ObjectInfo]:
        folder = self.root / url
        return {p.name: ObjectInfo(p.stat().st_size, None) for p in folder.glob("*") if p.is_file()}

    def exists(self, url: str) -> bool:
        return (self.root / url).exists()


def point(step: int, **values: Any) -> dict[str, Any]:
    return {"kind": "metrics", "at": 1000 + step, "stage": 0, "step": step, "values": values or {"loss": float(step)}}


def steps(journal: Journal) -> list[int]:
    return [record["step"] for session in journal.sessions() for _, record in journal.records(session)]


def session_of(journal: Journal, first: int, last: int) -> JournalWriter:
    writer = journal.start_session()
    for step in range(first, last + 1):
        writer.append(point(step))
    return writer


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def test_records_are_read_back_with_their_offsets(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    session_of(journal, 1, 3).close()
    (session,) = journal.sessions()

    read = list(journal.records(session))

    assert [record for _, record in read] == [point(1), point(2), point(3)]
    assert [record for _, record in journal.records(session, read[0][0])] == [point(2), point(3)]
    assert read[-1][0] == journal.path(session).stat().st_size


def test_numbers_keep_every_bit_including_non_finite_ones(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    values = {"third": 1 / 3, "tiny": 5e-324, "nan": math.nan, "up": math.inf, "down": -math.inf}
    writer = journal.start_session()
    writer.append(point(1, **{key: encode_number(value) for key, value in values.items()}))
    writer.close()

    ((_, record),) = journal.records(journal.sessions()[0])

    assert all(
        float(record["values"][key]) == value or (math.isnan(value) and math.isnan(float(record["values"][key])))
        for key, value in values.items()
    )


def test_a_torn_last_line_is_skipped_and_never_committed(tmp_path: Path, store: FolderStore) -> None:
    journal = Journal(tmp_path / "here")
    session_of(journal, 1, 2).close()
    with journal.path(journal.sessions()[0]).open("ab") as file:
        file.write(b'{"kind":"metrics","step":3,"val')
    session_of(journal, 3, 4).close()  # the restart writes a session of its own

    CommittedJournal(store, "run/journal").commit(journal)
    elsewhere = Journal(tmp_path / "elsewhere")
    CommittedJournal(store, "run/journal").restore(elsewhere)

    assert steps(journal) == steps(elsewhere) == [1, 2, 3, 4]
    assert b'"val' not in elsewhere.path(elsewhere.sessions()[0]).read_bytes()[-20:]


def test_a_damaged_line_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "000001-ab.jsonl"
    path.write_bytes(END + b"\x00\x00\x00\n" + END)

    assert [record["kind"] for _, record in Journal(tmp_path).records("000001-ab")] == ["run_end", "damaged", "run_end"]
    assert "damaged" in caplog.text


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
    writer = session_of(journal, 1, 1)
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


def test_replayed_steps_are_filtered_at_any_logging_interval() -> None:
    replay_filter = ReplayFilter()
    for step in (10, 20, 30):
        replay_filter.keep_new(0, step, {"loss": 1.0})

    replay = {step: replay_filter.keep_new(0, step, {"loss": 1.0}) for step in (7, 14, 21, 28, 35)}

    assert [step for step, values in replay.items() if values] == [35]
    assert replay_filter.keep_new(1, 7, {"loss": 1.0}) == {"loss": 1.0}, "stages are independent"
    assert replay_filter.keep_new(0, 30, {"lr": 0.1, "loss": 1.0}) == {"lr": 0.1}, (
        "keys recorded after the crash are kept"
    )


def test_only_repeated_evaluations_are_filtered() -> None:
    replay_filter = ReplayFilter()
    replay_filter.keep_new(None, 500, {"eval/r1": 0.5})

    assert replay_filter.keep_new(None, 100, {"eval/r1": 0.1}) == {"eval/r1": 0.1}
    assert replay_filter.keep_new(None, 500, {"eval/r1": 0.5}) == {}
    assert replay_filter.keep_new(None, 500, {"eval/r1": 0.6}) == {"eval/r1": 0.6}


def test_segments_of_several_commits_restore_the_journal(tmp_path: Path, store: FolderStore) -> None:
    journal, committed = Journal(tmp_path / "here"), CommittedJournal(store, "run/journal")
    writer = session_of(journal, 1, 5)
    committed.commit(journal)
    committed.commit(journal)  # nothing new: nothing uploaded
    for step in range(6, 9):
        writer.append(point(step))
    committed.commit(journal)
    writer.close()

    elsewhere = Journal(tmp_path / "elsewhere")
    assert CommittedJournal(store, "run/journal").restore(elsewhere)

    assert steps(elsewhere) == list(range(1, 9))
    assert len(store.list_info("run/journal")) == 2
    assert not CommittedJournal(store, "run/journal").restore(elsewhere), "nothing is missing any more"


def test_uncommitted_records_of_a_returning_node_are_void(tmp_path: Path, store: FolderStore) -> None:
    first, second = Journal(tmp_path / "first"), Journal(tmp_path / "second")
    writer = session_of(first, 1, 5)
    CommittedJournal(store, "run/journal").commit(first)
    for step in range(6, 9):
        writer.append(point(step))
    writer.close()  # the first node is lost at step 8; the second one resumes at 5
    resumed = CommittedJournal(store, "run/journal")
    resumed.restore(second)
    session_of(second, 6, 12).close()
    resumed.commit(second)

    assert CommittedJournal(store, "run/journal").restore(first)

    assert steps(first) == steps(second) == list(range(1, 13))


def test_a_journal_restored_for_a_report_stays_marked(tmp_path: Path, store: FolderStore) -> None:
    first, second = Journal(tmp_path / "first"), Journal(tmp_path / "second")
    session_of(first, 1, 5).close()
    CommittedJournal(store, "run/journal").commit(first)

    assert CommittedJournal(store, "run/journal").restore(second), "read for a report"
    assert not CommittedJournal(store, "run/journal").restore(second)
    assert second.restored.exists(), "no run has gone on from it here"


def test_a_session_being_written_is_never_truncated(tmp_path: Path, store: FolderStore) -> None:
    first, second = Journal(tmp_path / "first"), Journal(tmp_path / "second")
    session_of(second, 1, 2).close()
    CommittedJournal(store, "run/journal").commit(second)
    alive = session_of(first, 3, 4)

    CommittedJournal(store, "run/journal").restore(first)

    assert sorted(steps(first)) == [1, 2, 3, 4]
    alive.close()


def test_a_run_copied_to_a_store_can_be_resumed_there(tmp_path: Path, store: FolderStore) -> None:
    local, elsewhere, third = (Journal(tmp_path / name) for name in ("local", "elsewhere", "third"))
    session_of(local, 1, 5).close()
    shutil.copytree(local.folder, store.root / "run/journal")

    copied = CommittedJournal(store, "run/journal")
    assert copied.restore(elsewhere)
    assert steps(elsewhere) == [1, 2, 3, 4, 5]
    session_of(elsewhere, 6, 8).close()
    copied.commit(elsewhere)

    assert CommittedJournal(store, "run/journal").restore(third)
    assert steps(third) == list(range(1, 9))
    assert len(store.list_info("run/journal")) == 2, "what was copied is not committed again"


def test_artifacts_travel_with_the_journal(tmp_path: Path, store: FolderStore) -> None:
    journal = Journal(tmp_path / "here")
    (journal.folder / "files" / REPORT).parent.mkdir(parents=True)
    (journal.folder / "files" / REPORT).write_bytes(b"<p>")
    writer = journal.start_session()
    writer.append({"kind": "artifact", "at": 1, "stage": None, "name": "report.html", "file": REPORT})
    CommittedJournal(store, "run/journal").commit(journal)
    writer.close()

    elsewhere = Journal(tmp_path / "elsewhere")
    CommittedJournal(store, "run/journal").restore(elsewhere)

    assert (elsewhere.folder / "files" / REPORT).read_bytes() == b"<p>"
