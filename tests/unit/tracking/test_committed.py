"""Any sequence of commits, faults, writers and damage restores a valid journal (contract C6)."""

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
from pipeline.tracking.journal import CommittedJournal, Journal, JournalWriter, committed_segments, encode
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.journals import REPORT, RUN, STAGE_START, URL, Objects, artifact, point, restored, steps, training

# ---- several writers, cuts, overlaps, repeats


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
        journal = restored(store, tmp_path / str(number))
        data = journal.path("000001-ab").read_bytes() if journal.sessions() else b""
        assert data == session[: [*covered, False].index(False)]


def test_sessions_of_other_living_processes_are_not_committed(tmp_path: Path) -> None:
    journal, store = Journal(tmp_path), Objects()
    training(journal, 1, 5).close()
    program = (
        "import sys; from pathlib import Path; from pipeline.tracking.journal import Journal, JournalWriter\n"
        "writer = JournalWriter(Journal(Path(sys.argv[1])))\n"
        "writer.append({'kind': 'tag', 'at': 1, 'stage': None, 'key': 'a', 'value': 'b'})\n"
        "print('begun', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    committed = CommittedJournal(store, RUN)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        dead, alive = journal.sessions()
        committed.commit(journal)
        assert [*committed_segments(store, URL)] == [dead]
        other.stdin.close()
    committed.commit(journal)
    assert [*committed_segments(store, URL)] == [dead, alive], "once it is dead, its records are committed"


def test_segments_of_several_commits_restore_the_journal(tmp_path: Path) -> None:
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


def test_restore_keeps_evaluations_sessions_being_written_and_copied_runs(tmp_path: Path) -> None:
    store, node, local = Objects(), Journal(tmp_path / "node"), Journal(tmp_path / "local")
    training(node, 1, 9).close()
    CommittedJournal(store, RUN).commit(node)
    evaluation = JournalWriter(local)
    evaluation.append(point(50, stage=None))
    evaluation.close()
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
        (journal.folder / "files" / file).parent.mkdir(parents=True)
        (journal.folder / "files" / file).write_bytes(file.encode())
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
def test_storage_faults_of_a_commit_lose_nothing_committed(tmp_path: Path, lasting: bool) -> None:
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


def test_a_failed_restore_can_be_repeated(tmp_path: Path) -> None:
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


def test_hostile_file_names_are_skipped_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "evil").write_text("a secret")
    for number, name in enumerate(HOSTILE):
        folder = tmp_path / str(number) / "cache" / "journal"
        data = encode(artifact(name)) + encode(point(1))
        segment = f"{URL}/000001-ab.{0:012d}-{len(data):012d}.jsonl"
        caplog.clear()

        journal, outward = restored(Objects({segment: data, f"{URL}/files/{name}": b"evil"}), folder), Objects()
        CommittedJournal(outward, RUN).commit(journal)

        assert "skipped" in caplog.text, name
        assert steps(journal) == [1], "the rest of the journal is restored"
        assert {path.name for path in folder.iterdir()} == {"000001-ab.jsonl", "restored"}, name
        assert [*folder.parent.parent.iterdir()] == [folder.parent], name
        assert [*folder.parent.iterdir()] == [folder], name
        assert not any(b"a secret" in data for data in outward.values()), name
    assert {path.name for path in tmp_path.iterdir()} == {"evil", *map(str, range(len(HOSTILE)))}


@pytest.mark.parametrize("link", ["file", "its folder", "files", "loop", "pipe", "missing"])
def test_links_are_not_followed_and_missing_artifacts_skipped(
    tmp_path: Path, link: str, caplog: pytest.LogCaptureFixture
) -> None:
    outside, journal, store = tmp_path / "outside", Journal(tmp_path / "journal"), Objects()
    (outside / "0123456789abcdef").mkdir(parents=True)
    for place in (outside, outside / "0123456789abcdef"):
        (place / "report.html").write_text("a secret")
    writer = training(journal, 1, 2)
    writer.append(artifact())
    writer.append(point(3))
    writer.close()
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


def test_mutated_segments_restore_a_prefix_and_raise_nothing(tmp_path: Path) -> None:
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
