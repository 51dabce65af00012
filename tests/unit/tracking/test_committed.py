"""Any sequence of commits, faults, writers and damage restores a valid journal (contract C6)."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.storage import ObjectInfo, Storage
from pipeline.tracking import lease
from pipeline.tracking.committed import CommittedJournal, committed_segments
from pipeline.tracking.journal import Journal, JournalWriter, encode, parse_records
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds, mutate

NAME = "0123456789abcdef/report.html"


class Objects(dict[str, bytes]):
    """Object store in memory."""

    def read(self, url: str) -> bytes:
        return self[url]

    def write(self, url: str, data: bytes) -> None:
        self[url] = data

    def exists(self, url: str) -> bool:
        return url in self

    def list_info(self, url: str) -> dict[str, ObjectInfo]:
        names = {key.removeprefix(f"{url}/"): data for key, data in self.items() if key.startswith(f"{url}/")}
        return {name: ObjectInfo(len(data), None) for name, data in names.items() if "/" not in name}


def point(step: int, stage: int | None = 0) -> dict[str, Any]:
    return {"kind": "metrics", "at": 1000 + step, "stage": stage, "step": step, "values": {"loss": float(step)}}


def begun() -> dict[str, Any]:
    return {"kind": "stage", "at": 1, "stage": 0, "name": "one", "params": {}, "tags": {}, "datasets": []}


def artifact(file: str, name: str = "report.html") -> dict[str, Any]:
    return {"kind": "artifact", "at": 1, "stage": None, "name": name, "file": file}


def steps(journal: Journal) -> list[int]:
    return [record["step"] for record in journal.all_records() if record["kind"] == "metrics"]


def training(journal: Journal, first: int, last: int) -> JournalWriter:
    writer = journal.start_session()
    writer.append(begun())
    for step in range(first, last + 1):
        writer.append(point(step))
    return writer


def restored(store: Any, folder: Path, url: str = "run/journal") -> Journal:
    journal = Journal(folder)
    CommittedJournal(store, url).restore(journal)
    return journal


# ---- R1: several writers, cuts, overlaps, repeats


def test_cuts_overlaps_and_repeats_restore_the_longest_prefix(tmp_path: Path) -> None:
    rng = random.Random(1)
    session = b"".join(encode(point(step)) for step in range(40))
    for number in range(fuzz_rounds(300)):
        store, covered = Objects(), [False] * len(session)
        for _ in range(rng.randint(1, 12)):
            start = rng.choice((0, rng.randrange(len(session)), rng.randrange(len(session))))
            end = rng.randint(start, min(len(session), start + rng.choice((10, 500, 4000))))
            store[f"run/journal/000001-ab.{start:012d}-{end:012d}.jsonl"] = session[start:end]
            covered[start:end] = [True] * (end - start)
        if rng.random() < 0.2:  # a copied local run
            whole = rng.randrange(len(session))
            store["run/journal/000001-ab.jsonl"] = session[:whole]
            covered[:whole] = [True] * whole
        prefix = [*covered, False].index(False)

        journal = restored(store, tmp_path / str(number))

        here = journal.path("000001-ab").read_bytes() if journal.sessions() else b""
        assert here == session[:prefix]


@pytest.mark.parametrize("shared", [True, False], ids=["one cache", "another machine"])
def test_concurrent_evaluation_removes_no_training_records(tmp_path: Path, shared: bool) -> None:
    store = Objects()
    trained, trains = Journal(tmp_path / "node"), CommittedJournal(store, "run/journal")
    trains.restore(trained)
    writer = training(trained, 1, 50)
    trains.commit(trained)
    for step in range(51, 76):
        writer.append(point(step))

    evaluated = trained if shared else Journal(tmp_path / "laptop")
    evaluates = CommittedJournal(store, "run/journal")  # as `mome evaluate` does
    evaluates.restore(evaluated)
    evaluation = evaluated.start_session()
    evaluation.append(point(50, stage=None))
    evaluates.commit(evaluated)
    evaluation.close()

    for last in (100, 150):
        for step in range(last - 24 if last == 100 else last - 49, last + 1):
            writer.append(point(step))
        trains.commit(trained)
    writer.close()

    assert sorted(steps(restored(store, tmp_path / "elsewhere"))) == sorted([*range(1, 151), 50])


def test_sessions_of_other_living_processes_are_not_committed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    dead = training(journal, 1, 5)
    dead.close()
    program = (
        "import sys; from pathlib import Path; from pipeline.tracking.journal import Journal\n"
        "writer = Journal(Path(sys.argv[1])).start_session()\n"
        "writer.append({'kind': 'tag', 'at': 1, 'stage': None, 'key': 'a', 'value': 'b'})\n"
        "print('begun', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        alive = next(session for session in journal.sessions() if session.startswith("000002"))
        store = Objects()
        committed = CommittedJournal(store, "run/journal")
        committed.commit(journal)
        while_it_lived = {name.split("/")[-1].split(".")[0] for name in store}
        other.stdin.close()
    committed.commit(journal)

    assert while_it_lived == {"000001-" + journal.sessions()[0].split("-")[1]}
    assert any(alive in name for name in store), "once it is dead, what it left is committed"


def test_an_uncommitted_evaluation_survives_a_restore(tmp_path: Path) -> None:
    store, here = Objects(), Journal(tmp_path / "here")
    evaluation = here.start_session()
    evaluation.append(point(50, stage=None))
    evaluation.close()
    node = Journal(tmp_path / "node")
    training(node, 1, 9).close()
    CommittedJournal(store, "run/journal").commit(node)

    CommittedJournal(store, "run/journal").restore(here)

    assert sorted(steps(here)) == sorted([*range(1, 10), 50])


def test_random_node_histories_restore_each_point_once(tmp_path: Path) -> None:
    """Training moves between nodes while evaluations run; checkpoints determine where it resumes."""
    for seed in range(fuzz_rounds(25)):
        rng, store = random.Random(seed), Objects()
        checkpoint, evaluations = 0, 0
        for _ in range(rng.randint(2, 5)):  # attempts of training, on either node
            node = Journal(tmp_path / str(seed) / rng.choice("ab"))
            committed = CommittedJournal(store, "run/journal")
            committed.restore(node)
            recorded = max((step for step in steps(node) if step < 10_000), default=0)
            writer = node.start_session()
            writer.append(begun())
            for step in range(checkpoint + 1, checkpoint + rng.randint(2, 40)):
                if step > recorded:  # replayed points are not recorded twice
                    writer.append(point(step))
                if rng.random() < 0.1:
                    committed.commit(node)
                    checkpoint = step
                if rng.random() < 0.05:
                    place = rng.choice((node, Journal(tmp_path / str(seed) / "laptop")))
                    evaluates = CommittedJournal(store, "run/journal")
                    evaluates.restore(place)
                    evaluations += 1
                    evaluation = place.start_session()
                    evaluation.append(point(10_000 + evaluations, stage=None))
                    evaluates.commit(place)
                    evaluation.close()
            writer.close()  # killed: without a last commit
        wanted = [*range(1, checkpoint + 1), *(10_000 + number for number in range(1, evaluations + 1))]

        restored_steps = steps(restored(store, tmp_path / str(seed) / "elsewhere"))

        assert len(restored_steps) == len(set(restored_steps)), f"seed {seed}: a point is there twice"
        assert set(wanted) <= set(restored_steps), f"seed {seed}: a committed point is lost"


# ---- each storage call of a commit and a restore failing in turn


def _commits(storage: Storage, folder: Path, url: str) -> None:
    journal, committed = Journal(folder), CommittedJournal(storage, url)
    with suppress(StorageError):  # as `JournalTracker.open`, which training then begins again
        committed.restore(journal)
    writer = training(journal, 1, 3)
    for file in ("0123456789abcdef/a.html", "0123456789abcdee/b.html"):
        (journal.folder / "files" / file).parent.mkdir(parents=True)
        (journal.folder / "files" / file).write_bytes(file.encode())
        writer.append(artifact(file))
        writer.append(point(4 if "a.html" in file else 5))
        with suppress(StorageError):  # `JournalTracker.commit` warns
            committed.commit(journal)
    if isinstance(storage, FailingStorage):
        storage.heal()
    writer.append(point(6))
    committed.commit(journal)
    writer.close()


def test_transient_storage_faults_of_a_commit_lose_nothing(tmp_path: Path) -> None:
    clean = FailingStorage()
    _commits(clean, tmp_path / "clean", f"{tmp_path}/clean-store/journal")
    tried = 0
    for tried, fault in enumerate(every_fault(clean.calls), 1):
        storage, url = FailingStorage(fault), f"{tmp_path}/store-{tried}/journal"
        _commits(storage, tmp_path / f"here-{tried}", url)

        elsewhere = Journal(tmp_path / f"elsewhere-{tried}")
        CommittedJournal(Storage(), url).restore(elsewhere)

        assert steps(elsewhere) == [1, 2, 3, 4, 5, 6], fault
        files = sorted(path.name for path in (elsewhere.folder / "files").glob("*/*"))
        assert files == ["a.html", "b.html"], fault
    assert tried >= 12


def test_permanent_storage_faults_of_a_commit_keep_a_prefix(tmp_path: Path) -> None:
    """A node is lost while its store is unavailable: the earlier commits are complete and can be restored."""
    clean = FailingStorage()
    _commits(clean, tmp_path / "clean", f"{tmp_path}/clean-store/journal")
    for number, fault in enumerate(every_fault(clean.calls, lasting=True)):
        storage, url = FailingStorage(fault), f"{tmp_path}/store-{number}/journal"
        storage.heal = lambda: None  # type: ignore[method-assign]
        with suppress(StorageError):
            _commits(storage, tmp_path / f"here-{number}", url)

        restored_steps = steps(restored(Storage(), tmp_path / f"elsewhere-{number}", url))

        assert restored_steps == list(range(1, len(restored_steps) + 1)), fault


def test_a_failed_restore_can_be_repeated(tmp_path: Path) -> None:
    url = f"{tmp_path}/store/journal"
    _commits(Storage(), tmp_path / "here", url)
    stale = b"".join(encode(record) for record in (begun(), point(1), point(2), point(3)))
    clean = FailingStorage()
    restored(clean, tmp_path / "clean", url)
    for number, fault in enumerate(every_fault(clean.calls)):
        journal, storage = Journal(tmp_path / f"elsewhere-{number}"), FailingStorage(fault)
        journal.folder.mkdir()
        journal.path("000001-ff").write_bytes(stale)  # recorded before another node trained, never committed
        with suppress(StorageError):
            CommittedJournal(storage, url).restore(journal)
        assert set(steps(journal)) <= set(range(1, 7)), fault

        CommittedJournal(Storage(), url).restore(journal)

        assert steps(journal) == [1, 2, 3, 4, 5, 6], fault
        assert len(list((journal.folder / "files").glob("*/*.html"))) == 2, fault


# ---- S1: names from records, and damage


HOSTILE = [
    "../../../evil", "/tmp/evil", "..", ".", "", "0123456789abcdef/..", "0123456789abcdef/.", "0123456789abcdef/",
    "0123456789abcdef/../../../evil", "0123456789abcdef/a/b", "0123456789abcdef/a\0b", "0123456789ABCDEF/a",
    "0123456789abcdef/" + "x" * 256, "0123456789abcdef/" + "é" * 200, "~/evil", "file:///tmp/evil", "evil",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_names_are_skipped_and_reported(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    folder = home / "cache" / "journal"
    secret = tmp_path / "evil"
    secret.write_text("a secret")
    data = encode(artifact(name)) + encode(point(1))
    store = Objects(
        {
            f"run/journal/000001-ab.{0:012d}-{len(data):012d}.jsonl": data,
            f"run/journal/files/{name}": b"evil",
        }
    )
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}

    journal = restored(store, folder)
    outward = Objects()
    CommittedJournal(outward, "other/journal").commit(journal)

    after = {path for path in tmp_path.rglob("*") if folder not in path.parents}
    assert after - before <= {home, home / "cache", folder}
    assert not (folder / "files").exists()
    assert not any(b"a secret" in data for data in outward.values())
    assert steps(journal) == [1], "the rest of the journal is restored"
    assert "skipped" in caplog.text


@pytest.mark.parametrize("link", ["file", "its folder", "files", "loop", "pipe"])
def test_links_out_of_the_journal_are_not_followed(tmp_path: Path, link: str, caplog: pytest.LogCaptureFixture) -> None:
    outside = tmp_path / "outside"
    (outside / "0123456789abcdef").mkdir(parents=True)
    for place in (outside, outside / "0123456789abcdef"):
        (place / "report.html").write_text("a secret")
    journal = Journal(tmp_path / "journal")
    writer = journal.start_session()
    writer.append(artifact(NAME))
    writer.close()
    linked = journal.folder / "files" / NAME
    if link == "loop":
        linked.parent.mkdir(parents=True)
        linked.symlink_to(linked)
    elif link == "pipe":
        linked.parent.mkdir(parents=True)
        os.mkfifo(linked)
    elif link == "files":
        (journal.folder / "files").symlink_to(outside)
    elif link == "its folder":
        linked.parent.parent.mkdir()
        linked.parent.symlink_to(outside)
    else:
        linked.parent.mkdir(parents=True)
        linked.symlink_to(outside / "report.html")

    store = Objects()
    CommittedJournal(store, "run/journal").commit(journal)

    assert journal.file(NAME) is None
    assert not any("files" in name for name in store)
    assert "not a file of this journal" in caplog.text


@pytest.mark.parametrize(
    "name", ["/abs/x", "../x", "a/../../x", "a//b", "", ".", "a/..", "a\0b", "x" * 2000, "a\\..\\b"]
)
def test_artifact_names_stay_inside_mlflows_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "000001-ab.jsonl"
    path.write_bytes(encode(artifact(NAME, name)))

    assert [record["kind"] for _, record in Journal(tmp_path).records("000001-ab")] == ["damaged"]


def test_missing_artifacts_stop_neither_commit_nor_restore(tmp_path: Path) -> None:
    journal, store = Journal(tmp_path / "here"), Objects()
    writer = training(journal, 1, 2)
    writer.append(artifact(NAME))
    writer.append(point(3))
    CommittedJournal(store, "run/journal").commit(journal)
    writer.close()

    assert steps(restored(store, tmp_path / "elsewhere")) == [1, 2, 3]


def test_mutated_segments_restore_a_prefix_and_raise_nothing(tmp_path: Path) -> None:
    rng = random.Random(3)
    records = [begun(), *(point(step) for step in range(1, 9)), artifact(NAME), point(9)]
    session = b"".join(encode(record) for record in records)
    cuts = [0, 400, 800, len(session)]
    names = [
        f"000001-ab.{start:012d}-{end:012d}.jsonl" for start, end in pairwise(cuts)
    ]  # fmt: skip
    for number in range(fuzz_rounds(400)):
        store = Objects({f"run/journal/files/{NAME}": b"<p>"})
        for name, (start, end) in zip(names, pairwise(cuts), strict=True):
            data = mutate(session[start:end], rng) if rng.random() < 0.4 else session[start:end]
            name = mutate(name.encode(), rng).decode("latin-1") if rng.random() < 0.1 else name
            if "/" not in name:
                store[f"run/journal/{name}"] = data
        segments = committed_segments(store, "run/journal")

        journal = restored(store, tmp_path / str(number))

        for name, chain in segments.items():
            assert chain[0].start == 0
            assert all(b.start <= a.end < b.end for a, b in pairwise(chain))
            assert journal.path(name).stat().st_size == chain[-1].end
        list(journal.all_records())
        assert not [path for path in tmp_path.iterdir() if not path.name.isdigit()]


def test_mutated_sessions_yield_valid_or_damaged_records() -> None:
    rng = random.Random(4)
    tag = {"kind": "tag", "at": 1, "stage": None, "key": "a", "value": "b"}
    session = b"".join(encode(record) for record in (begun(), point(1), artifact(NAME), tag, point(2)))
    for _ in range(fuzz_rounds(2000)):
        for _, record in parse_records(io.BytesIO(mutate(session, rng)), "a session"):
            json.dumps(record).encode()
            assert record["kind"] == "damaged" or isinstance(record["at"], int)
            assert record["stage"] is None or 0 <= record["stage"] < 10_000
            if record["kind"] == "artifact":
                assert ".." not in record["file"].split("/")
                assert not record["name"].startswith("/")


# ---- R10: a file system without locks


def test_heartbeats_replace_missing_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr("fcntl.flock", no_locks)
    journal = Journal(tmp_path)
    writer = training(journal, 1, 3)
    (session,) = journal.sessions()

    assert "no file locks" in caplog.text
    assert lease.is_held(journal.path(session))
    monkeypatch.setattr(lease, "_held", set())  # as another process sees it
    assert lease.is_held_elsewhere(journal.path(session))
    os.utime(journal.folder / f"{session}.jsonl.heartbeat", (1, 1))
    assert not lease.is_held_elsewhere(journal.path(session)), "its process has died"
    writer.close()
    assert not lease.is_held(journal.path(session))
    assert steps(journal) == [1, 2, 3]
    assert not list(tmp_path.glob("*.heartbeat"))
