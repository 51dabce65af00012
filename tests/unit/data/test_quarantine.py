"""Bad samples are counted per source and fatal above a rate; samples being decoded are reported if a rank hangs."""

import io
import mmap
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from unittest import mock

import pytest

from pipeline.config.errors import DataError, StorageError
from pipeline.data import quarantine
from pipeline.data.quarantine import MIN_SEEN, BadRecord, BadSample, Quarantine, decoding, judging, samples_in_progress
from pipeline.data.storage import Storage
from pipeline.training.supervisor import Watchdog


def record(number: int, source: str = "pairs") -> BadRecord:
    return BadRecord(source, "00000.tar", f"key{number}", 512, 0, 3, number, "image", "corrupt JPEG", "another")


def test_counts_are_per_source_and_a_rate_of_enough_samples_above_the_bound_is_fatal():
    counts = Quarantine(max_bad_rate=0.01)
    counts.deliver(["pairs"] * MIN_SEEN + ["more"] * 1000, [record(1), record(1, "more")])
    assert (counts.bad, counts.seen) == ({"pairs": 1, "more": 1}, {"pairs": 100, "more": 1000})
    assert [(bad.source, bad.key) for bad in counts.new] == [("pairs", "key1"), ("more", "key1")]
    message = r"source 'pairs': 3 of 200 samples are bad \(1\.5%\).*key2 in 00000\.tar.*max_bad"
    with pytest.raises(DataError, match=message):
        counts.deliver(["pairs"] * 100, [record(1), record(2)])
    few = Quarantine(max_bad_rate=0.01)
    few.deliver(["pairs"] * 10, [record(1)], is_last=True)
    few.deliver(["pairs"] * 10, [record(2)])
    with pytest.raises(DataError, match=r"2 of 20"):
        few.deliver([], [], is_last=True)


def test_only_faults_of_the_sample_become_bad_samples_with_reproducible_encodable_reasons():
    unicode = UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "x")
    for fault in (ValueError("long " * 1000), RecursionError(), KeyError(6), AssertionError(), unicode):
        with pytest.raises(BadSample, match=type(fault).__name__) as raised, judging("image"):
            raise fault
        assert (raised.value.stage, len(raised.value.reason.encode()) <= 300) == ("image", True)
    bad = BadSample("caption", "half a \ud83d")
    for other in (StorageError("away"), DataError("cut"), MemoryError(), KeyboardInterrupt(), bad):
        with pytest.raises(type(other)) as unchanged, judging("image"):
            raise other
        assert unchanged.value is other
    copy = pickle.loads(pickle.dumps(bad))  # noqa: S301
    assert (copy.stage, copy.reason) == ("caption", "half a \\ud83d")
    assert BadSample("image", f"cannot identify {io.BytesIO()}").reason == "cannot identify <_io.BytesIO object>"


def test_samples_being_decoded_are_reported_for_every_thread_and_name() -> None:
    ready, over, keys = threading.Barrier(4), threading.Event(), [f"pairs: 00000.tar key{n}" for n in range(3)]

    def decode(key: str) -> None:
        with decoding(key):
            ready.wait(10)
            over.wait(10)

    with ThreadPoolExecutor(3) as pool:
        pool.map(decode, keys)
        ready.wait(10)
        assert sorted(samples_in_progress()) == keys
        over.set()
    assert samples_in_progress() == []
    for key in ("k" * 1000, "\ud83d", "é" * 300, ""):
        with decoding(f"pairs: {key}"), decoding(f"pairs: {key}"):
            (name,) = samples_in_progress()
            assert name.startswith("pairs: ")
        with pytest.raises(ValueError, match="of the decoder"), decoding("pairs: key"):
            raise ValueError("of the decoder")
        assert samples_in_progress() == []


def test_watchdog_reports_samples_of_other_processes(tmp_path, monkeypatch) -> None:
    file = (tmp_path / "samples").open("w+b")
    file.truncate(quarantine.BOARD_BYTES)
    stuck = (
        "import mmap, os, signal, sys; from pipeline.data import quarantine\n"
        "quarantine.boards[0] = mmap.mmap(int(sys.argv[1]), quarantine.BOARD_BYTES)\n"
        "with quarantine.decoding('pairs: 00007.tar poison'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", stuck, str(file.fileno())], pass_fds=(file.fileno(),), check=False)
    monkeypatch.setattr(quarantine, "boards", [*quarantine.boards, mmap.mmap(file.fileno(), quarantine.BOARD_BYTES)])
    monkeypatch.setattr("pipeline.training.supervisor.KeyValueStore", mock.Mock(side_effect=RuntimeError("no store")))
    rank, ended = mock.Mock(rank=0, world_size=1, calls=0, inside=""), []
    with closing(Watchdog(rank, Storage(), str(tmp_path), {"startup": 1.0}, ended.append)) as watchdog:
        watchdog._finish("rank 0 hangs")
    (report,) = (tmp_path / "stacks").iterdir()
    assert (ended, "samples being decoded: pairs: 00007.tar poison" in report.read_text()) == ([75], True)
