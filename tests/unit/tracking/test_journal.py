"""A journal survives torn lines, killed writers, full disks, replays and damage; its commits restore it (C6)."""

import io
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.config.durable import write_durably
from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage
from pipeline.tracking import journal as journals
from pipeline.tracking.journal import RESTORED, UPLOAD_LOCK, CommittedJournal, Journal, JournalWriter
from pipeline.tracking.mlflow_replay import Cursor, pending_bytes
from pipeline.tracking.tracker import History
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.journals import RUN, STAGE_START, URL, Objects, artifact, encode, point, restored, steps, training

REPORT = artifact()["file"]
TAG = {"kind": "tag", "at": 1, "stage": None, "key": "a", "value": "b"}
END = encode({"kind": "run_end", "at": 1, "stage": None, "status": "FINISHED"})
SERVER = "http://server"
# Another process that writes a session in the folder argv[1].
WRITER = """import os, pathlib, signal, sys; from pipeline.tracking.journal import Journal, JournalWriter
writer = JournalWriter(Journal(pathlib.Path(sys.argv[1])))
"""


def parsed(*lines: bytes) -> list[dict]:
    return [record for _, record in journals.parse_records(lines, "a session")]


def test_records_are_read_back_and_damaged_ones_marked(tmp_path, caplog):
    journal = Journal(tmp_path)
    training(journal, 1, 2).close()
    (session,) = journal.sessions()
    ends, read = zip(*journal.records(session), strict=True)
    assert (read, ends[-1]) == ((STAGE_START, point(1), point(2)), session.stat().st_size)
    assert [record for _, record in journal.records(session, ends[1])] == [point(2)]
    assert [record["kind"] for record in parsed(END, b"\x00\x00\x00\n", END)] == ["run_end", "damaged", "run_end"]
    assert "damaged" in caplog.text
    for name in ("/abs/x", "../x", "a/../../x", "a//b", "", ".", "a/..", "a\0b", "x" * 2000, "a\\..\\b"):
        assert parsed(encode(artifact(name=name)))[0]["kind"] == "damaged", f"{name!r} leaves MLflow's artifact folder"
    rng, whole = random.Random(4), encode(STAGE_START, point(1), artifact(), TAG, point(2))
    for _ in range(fuzz_rounds(2000)):
        for record in parsed(*io.BytesIO(mutate(whole, rng))):
            json.dumps(record).encode()
            assert record["kind"] == "damaged" or isinstance(record["at"], int)
            assert record["stage"] is None or 0 <= record["stage"] < 10_000
            if record["kind"] == "artifact":
                assert ".." not in record["file"].split("/")
                assert not record["name"].startswith("/")


def test_a_killed_writer_and_a_full_disk_lose_no_record(tmp_path, monkeypatch):
    program = f"{WRITER}for step in range(500): writer.append({point(0)} | {{'step': step}})\n"
    command = [sys.executable, "-c", f"{program}os.kill(os.getpid(), signal.SIGKILL)", str(tmp_path / "killed")]
    done = subprocess.run(command, check=False)
    assert (done.returncode, steps(Journal(tmp_path / "killed"))) == (-signal.SIGKILL, list(range(500)))

    journal, real_write, space = Journal(tmp_path / "full"), os.write, [7]  # bytes that still fit

    def write(descriptor: int, data: bytes) -> int:
        if not space:
            raise OSError(28, "No space left on device")
        return real_write(descriptor, data[: space.pop()])

    writer = training(journal, 1, 1)
    with monkeypatch.context() as context:
        context.setattr(os, "write", write)
        writer.append(point(2))
        writer.append(point(3))
    writer.append(point(4) | {"key": "\ud800"})  # an unpaired surrogate, which UTF-8 cannot encode
    assert steps(journal) == [1, 2, 3, 4]
    assert journal.sessions()[0].read_bytes().endswith(b'"key":"?"}\n')


def test_heartbeats_replace_missing_file_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, os.strerror(37))))
    journal = Journal(tmp_path)
    writer = training(journal, 1, 3)
    (path,) = journal.sessions()
    assert "no file locks" in caplog.text
    assert journals.is_held(path)
    with monkeypatch.context() as context:
        context.setattr(journals, "_leased", set())  # as another process sees it
        assert journals.is_held(path, elsewhere=True)
        os.utime(f"{path}.heartbeat", (1, 1))
        assert not journals.is_held(path, elsewhere=True), "its process has died"
    writer.close()
    assert not journals.is_held(path)
    assert (steps(journal), list(tmp_path.glob("*.heartbeat"))) == ([1, 2, 3], [])
    for _ in range(2):
        with closing(journals.Lease(journal.folder / UPLOAD_LOCK)), pytest.raises(journals.InUse):
            journals.Lease(journal.folder / UPLOAD_LOCK)


def test_replayed_steps_and_evaluations_are_filtered(tmp_path):
    history = History(Journal(tmp_path))
    for step in (10, 20, 30):
        history.keep_new(0, step, {"loss": 1.0})
    replay = {step: history.keep_new(0, step, {"loss": 1.0}) for step in (7, 14, 21, 28, 35)}
    assert [step for step, values in replay.items() if values] == [35], "at any logging interval"
    assert history.keep_new(1, 7, {"loss": 1.0}) == {"loss": 1.0}, "stages are independent"
    assert history.keep_new(0, 30, {"lr": 0.1, "loss": 1.0}) == {"lr": 0.1}, "keys recorded later are kept"
    for step, value, is_new in ((500, 0.5, True), (100, 0.1, True), (500, 0.5, False), (500, 0.6, True)):
        assert bool(history.keep_new(None, step, {"eval/r1": value})) == is_new


def test_a_damaged_cursor_only_repeats_the_upload(tmp_path):
    rng, journal = random.Random(7), Journal(tmp_path)
    training(journal, 0, 2).close()
    (session,) = journal.sessions()
    whole = session.read_bytes()
    ends = {0} | {number + 1 for number, byte in enumerate(whole) if byte == 10}
    cursor = Cursor.load(tmp_path, SERVER)
    cursor.marks = {"0": {"train/loss": 7}}
    for offset in range(len(whole) + 10):  # an impossible offset repeats the whole session
        cursor.offsets = {session.stem: offset}
        cursor.save()
        assert Cursor.load(tmp_path, SERVER).offsets == {session.stem: offset}
        assert pending_bytes(tmp_path, SERVER) == len(whole) - (offset if offset in ends else 0)
    (path,) = tmp_path.glob("cursor-*.json")
    saved = path.read_bytes()
    extreme = [b"", b"[]", b"1", b"[" * 100_000, b'{"offsets": [], "marks": {}}', b'{"offsets": {"a": -5}}']
    extreme += [b'{"offsets": {"a": "b"}, "marks": {}}', b'{"marks": {"0": {"x": "y"}}}']
    for data in [*extreme, *(mutate(saved, rng) for _ in range(fuzz_rounds(500)))]:
        path.write_bytes(data)
        read = Cursor.load(tmp_path, SERVER)
        assert all(isinstance(offset, int) and offset >= 0 for offset in read.offsets.values())
        assert all(isinstance(step, int) for marks in read.marks.values() for step in marks.values())
        pending_bytes(tmp_path, SERVER)


def test_cut_overlapping_repeated_and_damaged_segments_restore_the_longest_prefix(tmp_path):
    rng, session = random.Random(1), encode(STAGE_START, *map(point, range(1, 38)), artifact(), point(38))
    for number in range(fuzz_rounds(700)):
        store, covered = Objects({f"{URL}/files/{REPORT}": b"<p>"}), [False] * len(session)
        for _ in range(rng.randint(1, 12)):
            start = rng.choice((0, rng.randrange(len(session)), rng.randrange(len(session))))
            end = rng.randint(start, min(len(session), start + rng.choice((10, 500, 4000))))
            store[f"{URL}/000001-ab.{start:012d}-{end:012d}.jsonl"] = session[start:end]
            covered[start:end] = [True] * (end - start)
        if rng.random() < 0.2:  # a copied local run
            whole = rng.randrange(len(session))
            store[f"{URL}/000001-ab.jsonl"] = session[:whole]
            covered[:whole] = [True] * whole
        for url in [*store][1:] if number % 2 else ():
            data, name = store.pop(url), url.removeprefix(f"{URL}/")
            data = mutate(data, rng) if rng.random() < 0.4 else data
            name = mutate(name.encode(), rng).decode("latin-1") if rng.random() < 0.1 else name
            store |= {} if "/" in name else {f"{URL}/{name}": data}
        journal, chains = restored(store, tmp_path / str(number)), journals.committed_segments(store, URL)
        for name, chain in chains.items():
            assert chain[0][0] == 0
            assert all(after[0] <= before[1] < after[1] for before, after in pairwise(chain))
            assert (journal.folder / f"{name}.jsonl").stat().st_size == chain[-1][1]
        data = b"".join(session.read_bytes() for session in journal.sessions())
        assert number % 2 or data == session[: [*covered, False].index(False)]
        steps(journal)
        assert not [path for path in tmp_path.iterdir() if not path.name.isdigit()]


def test_whole_records_of_own_and_dead_sessions_are_committed_once_and_restored(tmp_path):
    store, journal = Objects(), Journal(tmp_path / "local")
    committed = CommittedJournal(store, RUN)
    with closing(training(journal, 1, 5)) as writer:
        committed.commit(journal)
        committed.commit(journal)  # nothing new: nothing uploaded
        writer.append(point(6))
        committed.commit(journal)
    assert len(store) == 2
    with journal.sessions()[0].open("ab") as file:
        file.write(b'{"kind":"metrics","step":7,"val')  # a torn last line is never committed
    training(journal, 7, 8).close()  # the restart writes a session of its own
    program = f"{WRITER}writer.append({TAG})\nprint('begun', flush=True); sys.stdin.read()"
    command, pipe = [sys.executable, "-c", program, str(journal.folder)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        *dead, alive = (session.stem for session in journal.sessions())
        committed.commit(journal)
        assert [*journals.committed_segments(store, URL)] == dead
        other.stdin.close()
    committed.commit(journal)
    assert [*journals.committed_segments(store, URL)] == [*dead, alive], "once it is dead, its records are committed"
    elsewhere = restored(store, tmp_path / "elsewhere")
    assert steps(journal) == steps(elsewhere) == list(range(1, 9))
    assert b'"val' not in elsewhere.sessions()[0].read_bytes()[-20:]
    (elsewhere.folder / RESTORED).unlink()  # it exists: no run has continued from the journal on this machine
    restored(store, elsewhere.folder)
    assert not (elsewhere.folder / RESTORED).exists(), "nothing was missing any more"


def test_restore_keeps_evaluations_sessions_being_written_and_copied_runs(tmp_path):
    store, node, local = Objects(), Journal(tmp_path / "node"), Journal(tmp_path / "local")
    training(node, 1, 9).close()
    CommittedJournal(store, RUN).commit(node)
    with closing(JournalWriter(local)) as evaluation:
        evaluation.append(point(50, stage=None))
    alive = training(local, 30, 31)
    restored(store, local.folder)
    assert sorted(steps(local)) == [*range(1, 10), 30, 31, 50]
    alive.close()
    # A local run's folder that was copied to the store is resumed there.
    store = Objects({f"{URL}/{path.name}": path.read_bytes() for path in node.folder.glob("*.jsonl")})
    copied, elsewhere = CommittedJournal(store, RUN), Journal(tmp_path / "elsewhere")
    copied.restore(elsewhere)
    assert steps(elsewhere) == list(range(1, 10))
    training(elsewhere, 10, 12).close()
    copied.commit(elsewhere)
    assert steps(restored(store, tmp_path / "third")) == list(range(1, 13))
    assert len(store) == 2, "what was copied is not committed again"


def test_random_node_histories_restore_each_point_once(tmp_path):
    """Training moves between nodes while evaluations run; checkpoints determine where it resumes."""
    for seed in range(fuzz_rounds(25)):
        rng, store, checkpoint, evaluations = random.Random(seed), Objects(), 0, 0
        for _ in range(rng.randint(2, 5)):  # attempts of training, on either node
            node, committed = Journal(tmp_path / str(seed) / rng.choice("ab")), CommittedJournal(store, RUN)
            committed.restore(node)
            recorded = max((step for step in steps(node) if step < 10_000), default=0)
            (writer := JournalWriter(node)).append(STAGE_START)
            for step in range(checkpoint + 1, checkpoint + rng.randint(2, 40)):
                if step > recorded:  # replayed points are not recorded twice
                    writer.append(point(step))
                if rng.random() < 0.1:
                    committed.commit(node)
                    checkpoint = step
                if rng.random() < 0.05:
                    place = rng.choice((node, Journal(tmp_path / str(seed) / "laptop")))
                    (evaluates := CommittedJournal(store, RUN)).restore(place)
                    evaluations += 1
                    with closing(JournalWriter(place)) as evaluation:
                        evaluation.append(point(10_000 + evaluations, stage=None))
                        evaluates.commit(place)
            writer.close()  # killed: without a last commit
        committed_steps = {*range(1, checkpoint + 1), *range(10_001, 10_001 + evaluations)}
        restored_steps = steps(restored(store, tmp_path / str(seed) / "elsewhere"))
        assert len(restored_steps) == len(set(restored_steps)), f"seed {seed}: a point is there twice"
        assert committed_steps <= set(restored_steps), f"seed {seed}: a committed point is lost"


def _commits(storage: Storage, folder: Path, run: str) -> None:
    journal, committed = Journal(folder), CommittedJournal(storage, run)
    with suppress(StorageError):  # as `Tracker.open`, which training then begins again
        committed.restore(journal)
    with closing(training(journal, 1, 3)) as writer:
        for step, file in ((4, "0123456789abcdef/a.html"), (5, "0123456789abcdee/b.html")):
            write_durably(journal.folder / "files" / file, file.encode())
            writer.append(artifact(file))
            writer.append(point(step))
            with suppress(StorageError):  # `Tracker.commit` warns
                committed.commit(journal)
        if isinstance(storage, FailingStorage):
            storage.heal()
        writer.append(point(6))
        committed.commit(journal)


@pytest.mark.parametrize("lasting", [False, True])
def test_storage_faults_of_a_commit_and_a_restore_lose_nothing_committed(tmp_path, lasting):
    """A node lost while its store is unavailable leaves its earlier commits, which are complete."""
    clean, store = FailingStorage(), f"memory://committed/{tmp_path.name}"
    _commits(clean, tmp_path / "clean", f"{store}/clean")
    faults = list(every_fault(clean.calls, lasting=lasting))
    assert len(faults) >= 12
    for number, fault in enumerate(faults):
        storage, run = FailingStorage(fault), f"{store}/{number}"
        if lasting:
            storage.heal = lambda: None  # type: ignore[method-assign]
        with suppress(StorageError):
            _commits(storage, tmp_path / f"local-{number}", run)
        elsewhere = restored(Storage(), tmp_path / f"elsewhere-{number}", run)
        restored_steps = steps(elsewhere)
        assert restored_steps == list(range(1, len(restored_steps) + 1)), fault
        if not lasting:
            assert restored_steps == [1, 2, 3, 4, 5, 6], fault
            files = {path.name: path.read_bytes()[-6:] for path in (elsewhere.folder / "files").glob("*/*")}
            assert files == {"a.html": b"a.html", "b.html": b"b.html"}, fault

    reading, run = FailingStorage(), f"{store}/clean"  # a restore that failed can be repeated
    restored(reading, tmp_path / "restored", run)
    for number, fault in enumerate(() if lasting else every_fault(reading.calls)):
        journal = Journal(tmp_path / f"repeated-{number}")
        journal.folder.mkdir()  # with steps recorded before another node trained, never committed
        (journal.folder / "000001-ff.jsonl").write_bytes(encode(STAGE_START, *map(point, (1, 2, 3))))
        with suppress(StorageError):
            CommittedJournal(FailingStorage(fault), run).restore(journal)
        assert set(steps(journal)) <= set(range(1, 7)), fault
        CommittedJournal(Storage(), run).restore(journal)
        assert steps(journal) == [1, 2, 3, 4, 5, 6], fault
        assert len(list((journal.folder / "files").glob("*/*.html"))) == 2, fault
    Storage().delete(store)


HOSTILE = [
    "../../../evil", "/tmp/evil", "..", ".", "", "0123456789abcdef/..", "0123456789abcdef/.", "0123456789abcdef/",
    "0123456789abcdef/../../../evil", "0123456789abcdef/a/b", "0123456789abcdef/a\0b", "0123456789ABCDEF/a",
    "0123456789abcdef/" + "x" * 256, "0123456789abcdef/" + "é" * 200, "~/evil", "file:///tmp/evil", "evil",
]  # fmt: skip


def test_hostile_file_names_are_skipped_and_reported(tmp_path, caplog):
    (tmp_path / "evil").write_text("a secret")
    for number, name in enumerate(HOSTILE):
        folder, data = tmp_path / str(number) / "cache" / "journal", encode(artifact(name), point(1))
        segment = f"{URL}/000001-ab.{0:012d}-{len(data):012d}.jsonl"
        caplog.clear()
        journal, outward = restored(Objects({segment: data, f"{URL}/files/{name}": b"evil"}), folder), Objects()
        CommittedJournal(outward, RUN).commit(journal)
        assert "skipped" in caplog.text, name
        assert steps(journal) == [1], "the rest of the journal is restored"
        assert {path.name for path in folder.iterdir()} == {"000001-ab.jsonl", "restored"}, name
        assert [*folder.parent.parent.iterdir(), *folder.parent.iterdir()] == [folder.parent, folder], name
        assert not any(b"a secret" in data for data in outward.values()), name
    assert {path.name for path in tmp_path.iterdir()} == {"evil", *map(str, range(len(HOSTILE)))}


@pytest.mark.parametrize("link", ["file", "its folder", "files", "loop", "pipe", "missing"])
def test_links_are_not_followed_and_missing_artifacts_skipped(tmp_path, link, caplog):
    outside, journal, store = tmp_path / "outside", Journal(tmp_path / "journal"), Objects()
    (outside / "0123456789abcdef").mkdir(parents=True)
    for place in (secret := outside / "report.html", outside / REPORT):
        place.write_text("a secret")
    with closing(training(journal, 1, 2)) as writer:
        writer.append(artifact())
        writer.append(point(3))
    path = journal.folder / "files" / REPORT
    link_path = {"files": path.parent.parent, "its folder": path.parent}.get(link, path)
    link_path.parent.mkdir(parents=True, exist_ok=True)
    if link == "pipe":
        os.mkfifo(path)
    elif link != "missing":
        link_path.symlink_to({"files": outside, "its folder": outside, "loop": path, "file": secret}[link])
    CommittedJournal(store, RUN).commit(journal)
    assert (journal.file(REPORT) is None) == (link != "missing")
    assert not any("files" in name for name in store)
    assert ("cannot be read" if link == "missing" else "not a file of this journal") in caplog.text
    assert steps(restored(store, tmp_path / "elsewhere")) == [1, 2, 3]
    cursor = Cursor.load(journal.folder, SERVER)
    for name in (UPLOAD_LOCK, cursor._path.name, cursor._path.with_suffix(".partial").name):
        (journal.folder / name).symlink_to(secret)
    cursor.save()
    with pytest.raises(OSError, match="symbolic links"):
        journals.Lease(journal.folder / UPLOAD_LOCK)
    assert secret.read_text() == "a secret"
