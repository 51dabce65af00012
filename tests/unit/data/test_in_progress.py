"""The report of a hung rank names the samples that its loader processes are decoding."""

import mmap
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest

from pipeline.data import in_progress
from pipeline.data.storage import Storage
from pipeline.training.watchdog import Watchdog


def test_samples_of_every_thread_and_of_any_name_are_reported() -> None:
    ready, over = threading.Barrier(4), threading.Event()

    def decode(number: int) -> None:
        with in_progress.decoding(f"pairs: 00000.tar key{number}"):
            ready.wait(10)
            over.wait(10)

    with ThreadPoolExecutor(3) as pool:
        pool.map(decode, range(3))
        ready.wait(10)
        assert sorted(in_progress.samples()) == [f"pairs: 00000.tar key{number}" for number in range(3)]
        over.set()
    assert in_progress.samples() == []
    for key in ("k" * 1000, "\ud83d", "é" * 300, ""):
        with in_progress.decoding(f"pairs: {key}"), in_progress.decoding(f"pairs: {key}"):
            (name,) = in_progress.samples()
            assert name.startswith("pairs: ")
        with pytest.raises(ValueError, match="of the decoder"), in_progress.decoding("pairs: key"):
            raise ValueError("of the decoder")
        assert in_progress.samples() == []


def test_watchdog_reports_samples_of_other_processes(tmp_path, monkeypatch) -> None:
    file = (tmp_path / "samples").open("w+b")
    file.truncate(in_progress.BYTES)
    memory = mmap.mmap(file.fileno(), in_progress.BYTES)
    stuck = (
        "import mmap, os, signal, sys; from pipeline.data import in_progress\n"
        "in_progress.boards[0] = mmap.mmap(int(sys.argv[1]), in_progress.BYTES)\n"
        "with in_progress.decoding('pairs: 00007.tar poison'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", stuck, str(file.fileno())], pass_fds=(file.fileno(),), check=False)
    in_progress.boards.append(memory)

    monkeypatch.setattr("pipeline.training.watchdog.KeyValueStore", mock.Mock(side_effect=RuntimeError("no store")))
    rank, ended = mock.Mock(rank=0, world_size=1, calls=0, inside=""), []
    watchdog = Watchdog(rank, Storage(), str(tmp_path), {"startup": 1.0}, ended.append)
    try:
        watchdog._finish("rank 0 hangs")
    finally:
        watchdog.close()
        in_progress.boards.remove(memory)
    assert ended == [75]
    (report,) = (tmp_path / "stacks").iterdir()
    assert "samples being decoded: pairs: 00007.tar poison" in report.read_text()
    assert in_progress.samples() == []
