"""A journal survives torn lines, killed writers, full disks, replays and damage; its commits restore it (C6)."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import closing, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.config.durable import write_durably
from pipeline.config.errors import ConfigError, StorageError, TrackingError
from pipeline.config.urls import local_path
from pipeline.data.storage import Storage
from pipeline.tracking import journal as journals
from pipeline.tracking.journal import CommittedJournal, Journal, JournalWriter, committed_segments, encode, is_held
from pipeline.tracking.locations import journal_folder, read_journal, read_run_id
from pipeline.tracking.mlflow_replay import Cursor, pending_bytes
from pipeline.tracking.tracker import History, Tracker
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.journals import RUN, STAGE_START, URL, Objects, artifact, config_of, point, restored, steps, training

REPORT = artifact()["file"]
TAG = {"kind": "tag", "at": 1, "stage": None, "key": "a", "value": "b"}
END = encode({"kind": "run_end", "at": 1, "stage": None, "status": "FINISHED"})
SERVER = "http://server"
# Another process that writes a session in the folder argv[1].
WRITER = (
    "import os, signal, sys; from pathlib import Path; from pipeline.tracking.journal import Journal, JournalWriter\n"
    "writer = JournalWriter(Journal(Path(sys.argv[1])))\n"
)


def parsed(*lines: bytes) -> list[dict]:
    return [record for _, record in journals.parse_records(lines, "a session")]


def test_records_are_read_back_and_damaged_ones_marked(tmp_path, caplog):
    journal = Journal(tmp_path)
    training(journal, 1, 2).close()
    (session,) = journal.sessions()
    read = list(journal.records(session))
    assert [record for _, record in read] == [STAGE_START, point(1), point(2)]
    assert [record for _, record in journal.records(session, read[1][0])] == [point(2)]
    assert read[-1][0] == journal.path(session).stat().st_size
    assert [record["kind"] for record in parsed(END, b"\x00\x00\x00\n", END)] == ["run_end", "damaged", "run_end"]
    assert "damaged" in caplog.text
    for name in ("/abs/x", "../x", "a/../../x", "a//b", "", ".", "a/..", "a\0b", "x" * 2000, "a\\..\\b"):
        assert parsed(encode(artifact(name=name)))[0]["kind"] == "damaged", f"{name!r} leaves MLflow's artifact folder"
    rng = random.Random(4)
    whole = b"".join(encode(record) for record in (STAGE_START, point(1), artifact(), TAG, point(2)))
    for _ in range(fuzz_rounds(2000)):
        for record in parsed(*io.BytesIO(mutate(whole, rng))):
            json.dumps(record).encode()
            assert record["kind"] == "damaged" or isinstance(record["at"], int)
            assert record["stage"] is None or 0 <= record["stage"] < 10_000
            if record["kind"] == "artifact":
                assert ".." not in record["file"].split("/")
                assert not record["name"].startswith("/")


def test_a_killed_writer_and_a_full_disk_lose_no_record(tmp_path, monkeypatch):
    program = WRITER + (
        "for step in range(500): writer.append({'kind': 'metrics', 'at': 0, 'stage': 0, 'step': step, 'values': {}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "killed")], check=False)
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
    writer.append(point(4))
    assert steps(journal) == [1, 2, 3, 4]


def test_heartbeats_replace_missing_file_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, os.strerror(37))))
    journal = Journal(tmp_path)
    writer = training(journal, 1, 3)
    path = journal.path(journal.sessions()[0])
    assert "no file locks" in caplog.text
    assert is_held(path)
    with monkeypatch.context() as context:
        context.setattr(journals, "_leased", set())  # as another process sees it
        assert is_held(path, elsewhere=True)
        os.utime(f"{path}.heartbeat", (1, 1))
        assert not is_held(path, elsewhere=True), "its process has died"
    writer.close()
    assert not is_held(path)
    assert (steps(journal), list(tmp_path.glob("*.heartbeat"))) == ([1, 2, 3], [])
    for _ in range(2):
        with closing(journals.Lease(journal.upload_lock)), pytest.raises(journals.InUse):
            journals.Lease(journal.upload_lock)


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


# ---- locations, and the files next to the journal


def test_a_folder_that_cannot_be_written_is_reported_with_a_remedy(tmp_path, monkeypatch):
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


def test_a_damaged_run_id_is_rejected_by_name(tmp_path):
    config, storage, rng = config_of(tmp_path), Storage(), random.Random(6)
    whole = json.dumps({"run": "f" * 32, "name": "run"}).encode()
    for data in (b"", b"[]", b"1", b'{"run": 5}', b'{"run": "a\' or 1"}', b"[" * 100_000, b'"run"', b"{}"):
        storage.write(f"{config.folder}/tracking.json", data)
        with pytest.raises(TrackingError, match=r"(?s)tracking.json is damaged.*restore it"):
            read_run_id(config, storage)
    for data in [whole, *(mutate(whole, rng) for _ in range(fuzz_rounds(300)))]:
        storage.write(f"{config.folder}/tracking.json", data)
        with suppress(TrackingError) if data != whole else nullcontext():
            assert re.fullmatch(r"[\w.-]{1,64}", read_run_id(config, storage) or "", re.ASCII)


def test_a_damaged_cursor_only_repeats_the_upload(tmp_path):
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


def test_symbolic_links_in_a_journal_are_not_followed(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "journal"
    victim.write_text("mine")
    folder.mkdir()
    cursor = Cursor.load(folder, SERVER)
    for name in ("uploader.lock", cursor._path.name, cursor._path.with_suffix(".partial").name):
        (folder / name).symlink_to(victim)
    cursor.save()
    with pytest.raises(OSError, match="symbolic links"):
        journals.Lease(Journal(folder).upload_lock)
    assert victim.read_text() == "mine"


# ---- commits by several writers: cuts, overlaps, repeats


def test_cuts_overlaps_and_repeats_restore_the_longest_prefix(tmp_path):
    rng = random.Random(1)
    session = b"".join(encode(point(step)) for step in range(40))
    for number in range(fuzz_rounds(300)):
        store, covered = Objects(), [False] * len(session)
        for _ in range(rng.randint(1, 12)):
            start = rng.choice((0, rng.randrange(len(session)), rng.randrange(len(session))))
            end = rng.randint(start, min(len(session), start + rng.choice((10, 500, 4000))))
            store[f"{URL}/000001-ab.{start:012d}-{end:012d}.jsonl"] = session[start:end]
            covered[start:end] = [True] * (end - start)
        if rng.random() < 0.2:  # a copied local run
            whole = rng.randrange(len(session))
            store[f"{URL}/000001-ab.jsonl"] = session[:whole]
            covered[:whole] = [True] * whole
        journal = restored(store, tmp_path / str(number))
        data = journal.path("000001-ab").read_bytes() if journal.sessions() else b""
        assert data == session[: [*covered, False].index(False)]


def test_sessions_of_other_living_processes_are_not_committed(tmp_path):
    journal, store = Journal(tmp_path), Objects()
    training(journal, 1, 5).close()
    program = f"{WRITER}writer.append({TAG})\nprint('begun', flush=True); sys.stdin.read()"
    command, committed = [sys.executable, "-c", program, str(tmp_path)], CommittedJournal(store, RUN)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        dead, alive = journal.sessions()
        committed.commit(journal)
        assert [*committed_segments(store, URL)] == [dead]
        other.stdin.close()
    committed.commit(journal)
    assert [*committed_segments(store, URL)] == [dead, alive], "once it is dead, its records are committed"


def test_segments_of_several_commits_restore_the_journal(tmp_path):
    store = Objects()
    journal, committed = Journal(tmp_path / "local"), CommittedJournal(store, RUN)
    writer = training(journal, 1, 5)
    committed.commit(journal)
    committed.commit(journal)  # nothing new: nothing uploaded
    writer.append(point(6))
    committed.commit(journal)
    writer.close()
    assert len(store) == 2
    with journal.path(journal.sessions()[0]).open("ab") as file:
        file.write(b'{"kind":"metrics","step":7,"val')  # a torn last line is never committed
    training(journal, 7, 8).close()  # the restart writes a session of its own
    committed.commit(journal)
    elsewhere = restored(store, tmp_path / "elsewhere")
    assert steps(journal) == steps(elsewhere) == list(range(1, 9))
    assert b'"val' not in elsewhere.path(elsewhere.sessions()[0]).read_bytes()[-20:]
    assert elsewhere.restored.exists(), "no run has continued from it on this machine"
    elsewhere.restored.unlink()
    restored(store, elsewhere.folder)
    assert not elsewhere.restored.exists(), "nothing was missing any more"


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
            writer = JournalWriter(node)
            writer.append(STAGE_START)
            for step in range(checkpoint + 1, checkpoint + rng.randint(2, 40)):
                if step > recorded:  # replayed points are not recorded twice
                    writer.append(point(step))
                if rng.random() < 0.1:
                    committed.commit(node)
                    checkpoint = step
                if rng.random() < 0.05:
                    place = rng.choice((node, Journal(tmp_path / str(seed) / "laptop")))
                    evaluates = CommittedJournal(store, RUN)
                    evaluates.restore(place)
                    evaluations += 1
                    evaluation = JournalWriter(place)
                    evaluation.append(point(10_000 + evaluations, stage=None))
                    evaluates.commit(place)
                    evaluation.close()
            writer.close()  # killed: without a last commit
        wanted = [*range(1, checkpoint + 1), *(10_000 + number for number in range(1, evaluations + 1))]
        restored_steps = steps(restored(store, tmp_path / str(seed) / "elsewhere"))
        assert len(restored_steps) == len(set(restored_steps)), f"seed {seed}: a point is there twice"
        assert set(wanted) <= set(restored_steps), f"seed {seed}: a committed point is lost"


# ---- each storage call of a commit and a restore failing in turn


def _commits(storage: Storage, folder: Path, run: str) -> None:
    journal, committed = Journal(folder), CommittedJournal(storage, run)
    with suppress(StorageError):  # as `Tracker.open`, which training then begins again
        committed.restore(journal)
    writer = training(journal, 1, 3)
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
    writer.close()


@pytest.mark.parametrize("lasting", [False, True])
def test_storage_faults_of_a_commit_lose_nothing_committed(tmp_path, lasting):
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
    Storage().delete(store)


def test_a_failed_restore_can_be_repeated(tmp_path):
    run, clean = f"memory://committed/{tmp_path.name}", FailingStorage()
    _commits(Storage(), tmp_path / "local", run)
    stale = b"".join(encode(record) for record in (STAGE_START, point(1), point(2), point(3)))
    restored(clean, tmp_path / "clean", run)
    for number, fault in enumerate(every_fault(clean.calls)):
        journal = Journal(tmp_path / f"elsewhere-{number}")
        journal.folder.mkdir()
        journal.path("000001-ff").write_bytes(stale)  # recorded before another node trained, never committed
        with suppress(StorageError):
            CommittedJournal(FailingStorage(fault), run).restore(journal)
        assert set(steps(journal)) <= set(range(1, 7)), fault
        CommittedJournal(Storage(), run).restore(journal)
        assert steps(journal) == [1, 2, 3, 4, 5, 6], fault
        assert len(list((journal.folder / "files").glob("*/*.html"))) == 2, fault
    Storage().delete(run)


# ---- names from records, and damage

HOSTILE = [
    "../../../evil", "/tmp/evil", "..", ".", "", "0123456789abcdef/..", "0123456789abcdef/.", "0123456789abcdef/",
    "0123456789abcdef/../../../evil", "0123456789abcdef/a/b", "0123456789abcdef/a\0b", "0123456789ABCDEF/a",
    "0123456789abcdef/" + "x" * 256, "0123456789abcdef/" + "é" * 200, "~/evil", "file:///tmp/evil", "evil",
]  # fmt: skip


def test_hostile_file_names_are_skipped_and_reported(tmp_path, caplog):
    (tmp_path / "evil").write_text("a secret")
    for number, name in enumerate(HOSTILE):
        folder, data = tmp_path / str(number) / "cache" / "journal", encode(artifact(name)) + encode(point(1))
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
    for place in (outside, outside / "0123456789abcdef"):
        (place / "report.html").write_text("a secret")
    with closing(training(journal, 1, 2)) as writer:
        writer.append(artifact())
        writer.append(point(3))
    path = journal.folder / "files" / REPORT
    link_path = {"files": path.parent.parent, "its folder": path.parent}.get(link, path)
    link_path.parent.mkdir(parents=True, exist_ok=True)
    if link == "pipe":
        os.mkfifo(path)
    elif link != "missing":
        target = {"files": outside, "its folder": outside, "loop": path, "file": outside / "report.html"}[link]
        link_path.symlink_to(target)
    CommittedJournal(store, RUN).commit(journal)
    assert (journal.file(REPORT) is None) == (link != "missing")
    assert not any("files" in name for name in store)
    assert ("cannot be read" if link == "missing" else "not a file of this journal") in caplog.text
    assert steps(restored(store, tmp_path / "elsewhere")) == [1, 2, 3]


def test_mutated_segments_restore_a_prefix_and_raise_nothing(tmp_path):
    rng = random.Random(3)
    records = [STAGE_START, *(point(step) for step in range(1, 9)), artifact(), point(9)]
    session = b"".join(encode(record) for record in records)
    for number in range(fuzz_rounds(400)):
        store = Objects({f"{URL}/files/{REPORT}": b"<p>"})
        for start, end in pairwise([0, 400, 800, len(session)]):
            data, name = session[start:end], f"000001-ab.{start:012d}-{end:012d}.jsonl"
            data = mutate(data, rng) if rng.random() < 0.4 else data
            name = mutate(name.encode(), rng).decode("latin-1") if rng.random() < 0.1 else name
            if "/" not in name:
                store[f"{URL}/{name}"] = data
        segments = committed_segments(store, URL)
        journal = restored(store, tmp_path / str(number))
        for name, chain in segments.items():
            assert chain[0][0] == 0
            assert all(after[0] <= before[1] < after[1] for before, after in pairwise(chain))
            assert journal.path(name).stat().st_size == chain[-1][1]
        list(journal.all_records())
        assert not [path for path in tmp_path.iterdir() if not path.name.isdigit()]
