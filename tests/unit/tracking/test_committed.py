"""Any sequence of commits, faults, writers and damage restores a valid journal (contract C6)."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.config.errors import StorageError
from pipeline.data.storage import Storage
from pipeline.tracking.committed import CommittedJournal, committed_segments
from pipeline.tracking.journal import Journal, encode
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.journals import (
    REPORT,
    RUN,
    STAGE_START,
    URL,
    Objects,
    artifact,
    commit,
    point,
    restored,
    steps,
    training,
)

# ---- R1: several writers, cuts, overlaps, repeats


def test_cuts_overlaps_and_repeats_restore_the_longest_prefix(tmp_path: Path) -> None:
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
        prefix = [*covered, False].index(False)

        journal = restored(store, tmp_path / str(number))

        here = journal.path("000001-ab").read_bytes() if journal.sessions() else b""
        assert here == session[:prefix]


def test_sessions_of_other_living_processes_are_not_committed(tmp_path: Path) -> None:
    journal, store = Journal(tmp_path), Objects()
    training(journal, 1, 5).close()
    program = (
        "import sys; from pathlib import Path; from pipeline.tracking.journal import Journal\n"
        "writer = Journal(Path(sys.argv[1])).start_session()\n"
        "writer.append({'kind': 'tag', 'at': 1, 'stage': None, 'key': 'a', 'value': 'b'})\n"
        "print('begun', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        other.stdout.readline()
        dead, alive = journal.sessions()
        committed = CommittedJournal(store, RUN)
        committed.commit(journal)
        while_it_lived = [*committed_segments(store, URL)]
        other.stdin.close()
    committed.commit(journal)

    assert while_it_lived == [dead]
    assert [*committed_segments(store, URL)] == [dead, alive], "once it is dead, what it left is committed"


def test_segments_of_several_commits_restore_the_journal(tmp_path: Path) -> None:
    store = Objects()
    journal, committed = Journal(tmp_path / "here"), CommittedJournal(store, RUN)
    writer = training(journal, 1, 5)
    committed.commit(journal)
    committed.commit(journal)  # nothing new: nothing uploaded
    for step in range(6, 9):
        writer.append(point(step))
    committed.commit(journal)
    writer.close()

    elsewhere = Journal(tmp_path / "elsewhere")
    CommittedJournal(store, RUN).restore(elsewhere)

    assert steps(elsewhere) == list(range(1, 9))
    assert len(store) == 2
    assert elsewhere.restored.exists(), "no run has gone on from it here"


def test_a_torn_last_line_is_skipped_and_never_committed(tmp_path: Path) -> None:
    store, journal = Objects(), Journal(tmp_path / "here")
    training(journal, 1, 2).close()
    with journal.path(journal.sessions()[0]).open("ab") as file:
        file.write(b'{"kind":"metrics","step":3,"val')
    training(journal, 3, 4).close()  # the restart writes a session of its own
    commit(store, journal)

    elsewhere = restored(store, tmp_path / "elsewhere")

    assert steps(journal) == steps(elsewhere) == [1, 2, 3, 4]
    assert b'"val' not in elsewhere.path(elsewhere.sessions()[0]).read_bytes()[-20:]


def test_a_session_being_written_is_never_truncated(tmp_path: Path) -> None:
    store, first, second = Objects(), Journal(tmp_path / "first"), Journal(tmp_path / "second")
    training(second, 1, 2).close()
    commit(store, second)
    alive = training(first, 3, 4)

    CommittedJournal(store, RUN).restore(first)

    assert sorted(steps(first)) == [1, 2, 3, 4]
    alive.close()


def test_a_run_copied_to_a_store_can_be_resumed_there(tmp_path: Path) -> None:
    local, elsewhere, third = (Journal(tmp_path / name) for name in ("local", "elsewhere", "third"))
    training(local, 1, 5).close()
    store = Objects({f"{URL}/{path.name}": path.read_bytes() for path in local.folder.glob("*.jsonl")})

    copied = CommittedJournal(store, RUN)
    copied.restore(elsewhere)
    assert steps(elsewhere) == [1, 2, 3, 4, 5]
    training(elsewhere, 6, 8).close()
    copied.commit(elsewhere)

    assert steps(restored(store, third.folder)) == list(range(1, 9))
    assert len(store) == 2, "what was copied is not committed again"


def test_an_uncommitted_evaluation_survives_a_restore(tmp_path: Path) -> None:
    store, here = Objects(), Journal(tmp_path / "here")
    evaluation = here.start_session()
    evaluation.append(point(50, stage=None))
    evaluation.close()
    node = Journal(tmp_path / "node")
    training(node, 1, 9).close()
    commit(store, node)

    CommittedJournal(store, RUN).restore(here)

    assert sorted(steps(here)) == sorted([*range(1, 10), 50])


def test_random_node_histories_restore_each_point_once(tmp_path: Path) -> None:
    """Training moves between nodes while evaluations run; checkpoints determine where it resumes."""
    for seed in range(fuzz_rounds(25)):
        rng, store = random.Random(seed), Objects()
        checkpoint, evaluations = 0, 0
        for _ in range(rng.randint(2, 5)):  # attempts of training, on either node
            node = Journal(tmp_path / str(seed) / rng.choice("ab"))
            committed = CommittedJournal(store, RUN)
            committed.restore(node)
            recorded = max((step for step in steps(node) if step < 10_000), default=0)
            writer = node.start_session()
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
    with suppress(StorageError):  # as `Tracker.open`, which training then begins again
        committed.restore(journal)
    writer = training(journal, 1, 3)
    for file in ("0123456789abcdef/a.html", "0123456789abcdee/b.html"):
        (journal.folder / "files" / file).parent.mkdir(parents=True)
        (journal.folder / "files" / file).write_bytes(file.encode())
        writer.append(artifact(file))
        writer.append(point(4 if "a.html" in file else 5))
        with suppress(StorageError):  # `Tracker.commit` warns
            committed.commit(journal)
    if isinstance(storage, FailingStorage):
        storage.heal()
    writer.append(point(6))
    committed.commit(journal)
    writer.close()


def test_transient_storage_faults_of_a_commit_lose_nothing(tmp_path: Path) -> None:
    clean = FailingStorage()
    _commits(clean, tmp_path / "clean", f"memory://committed/{tmp_path.name}/clean-store")
    faults = list(every_fault(clean.calls))
    assert len(faults) >= 12
    for number, fault in enumerate(faults):
        url = f"memory://committed/{tmp_path.name}/store-{number}"
        _commits(FailingStorage(fault), tmp_path / f"here-{number}", url)

        elsewhere = restored(Storage(), tmp_path / f"elsewhere-{number}", url)

        assert steps(elsewhere) == [1, 2, 3, 4, 5, 6], fault
        files = {path.name: path.read_bytes()[-6:] for path in (elsewhere.folder / "files").glob("*/*")}
        assert files == {"a.html": b"a.html", "b.html": b"b.html"}, fault


def test_permanent_storage_faults_of_a_commit_keep_a_prefix(tmp_path: Path) -> None:
    """A node is lost while its store is unavailable: the earlier commits are complete and can be restored."""
    clean = FailingStorage()
    _commits(clean, tmp_path / "clean", f"memory://committed/{tmp_path.name}/clean-store")
    for number, fault in enumerate(every_fault(clean.calls, lasting=True)):
        storage, url = FailingStorage(fault), f"memory://committed/{tmp_path.name}/store-{number}"
        storage.heal = lambda: None  # type: ignore[method-assign]
        with suppress(StorageError):
            _commits(storage, tmp_path / f"here-{number}", url)

        restored_steps = steps(restored(Storage(), tmp_path / f"elsewhere-{number}", url))

        assert restored_steps == list(range(1, len(restored_steps) + 1)), fault


def test_a_failed_restore_can_be_repeated(tmp_path: Path) -> None:
    url = f"memory://committed/{tmp_path.name}/store"
    _commits(Storage(), tmp_path / "here", url)
    stale = b"".join(encode(record) for record in (STAGE_START, point(1), point(2), point(3)))
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
            f"{URL}/000001-ab.{0:012d}-{len(data):012d}.jsonl": data,
            f"{URL}/files/{name}": b"evil",
        }
    )
    before = {path for path in tmp_path.rglob("*") if folder not in path.parents}

    journal = restored(store, folder)
    outward = Objects()
    CommittedJournal(outward, "memory://other").commit(journal)

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
    writer.append(artifact())
    writer.close()
    path = journal.folder / "files" / REPORT
    link_path = {"files": path.parent.parent, "its folder": path.parent}.get(link, path)
    link_path.parent.mkdir(parents=True, exist_ok=True)
    if link == "pipe":
        os.mkfifo(path)
    else:
        target = {"files": outside, "its folder": outside, "loop": path, "file": outside / "report.html"}[link]
        link_path.symlink_to(target)

    store = Objects()
    commit(store, journal)

    assert journal.file(REPORT) is None
    assert not any("files" in name for name in store)
    assert "not a file of this journal" in caplog.text


def test_missing_artifacts_stop_neither_commit_nor_restore(tmp_path: Path) -> None:
    journal, store = Journal(tmp_path / "here"), Objects()
    writer = training(journal, 1, 2)
    writer.append(artifact())
    writer.append(point(3))
    commit(store, journal)
    writer.close()

    assert steps(restored(store, tmp_path / "elsewhere")) == [1, 2, 3]


def test_mutated_segments_restore_a_prefix_and_raise_nothing(tmp_path: Path) -> None:
    rng = random.Random(3)
    records = [STAGE_START, *(point(step) for step in range(1, 9)), artifact(), point(9)]
    session = b"".join(encode(record) for record in records)
    cuts = [0, 400, 800, len(session)]
    names = [
        f"000001-ab.{start:012d}-{end:012d}.jsonl" for start, end in pairwise(cuts)
    ]  # fmt: skip
    for number in range(fuzz_rounds(400)):
        store = Objects({f"{URL}/files/{REPORT}": b"<p>"})
        for name, (start, end) in zip(names, pairwise(cuts), strict=True):
            data = mutate(session[start:end], rng) if rng.random() < 0.4 else session[start:end]
            name = mutate(name.encode(), rng).decode("latin-1") if rng.random() < 0.1 else name
            if "/" not in name:
                store[f"{URL}/{name}"] = data
        segments = committed_segments(store, URL)

        journal = restored(store, tmp_path / str(number))

        for name, chain in segments.items():
            assert chain[0][0] == 0
            assert all(b[0] <= a[1] < b[1] for a, b in pairwise(chain))
            assert journal.path(name).stat().st_size == chain[-1][1]
        list(journal.all_records())
        assert not [path for path in tmp_path.iterdir() if not path.name.isdigit()]
