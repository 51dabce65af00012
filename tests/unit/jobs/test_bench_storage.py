"""`mome bench storage`: every reader reads the same bytes, and a measurement leaves no files behind."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from jobs.bench.storage import MIB, ReadTarget, bench_storage, clients_of
from pipeline.config.errors import ConfigError, StorageError
from pipeline.config.schema import StorageConfig
from pipeline.data.storage import Storage, join

module = importlib.import_module("jobs.bench.storage")  # the package's attribute of this name is the command
READ = {"mb_per_second", "cpu_seconds_per_gib", "first_byte_seconds", "requests"}
LIST = {"seconds", "cpu_seconds", "objects_per_second", "requests"}
LOCAL = {"mome", "mome.open", "fsspec.cat_ranges", "fsspec.open"}
SIZE = 3 * MIB + 5  # the last range is shorter


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_every_client_reads_an_object_and_lists_a_folder(place: str, tmp_path: Path, s3: Any) -> None:
    url, config = (s3.url("measured"), s3.config) if place == "bucket" else (str(tmp_path), StorageConfig())
    storage, data = Storage(config), os.urandom(SIZE)
    for name in ("object", "many/one", "many/other"):
        storage.write(join(url, name), data)
    readers, listers = clients_of(ReadTarget(storage, url, SIZE, MIB, in_flight=2))
    assert all(b"".join(read()) == data for read in readers.values())
    assert all(sorted(names()) == ["one", "other"] for names in listers.values())


def test_results_count_requests_and_leave_no_files(s3: Any, tmp_path: Path) -> None:
    small = {"object_bytes": SIZE, "range_bytes": MIB, "objects": 3}
    result = bench_storage(s3.url("measured"), s3.config, **small, rounds=2)
    read, listing = result["read"], result["list"]
    assert (result["url"], result["object_bytes"], listing.pop("objects")) == (s3.url("measured"), SIZE, 3)
    assert set(read) == LOCAL | {"botocore.ranges", "botocore.open"}
    assert all(set(figures) == READ for figures in read.values())
    assert read["botocore.ranges"]["requests"] == read["fsspec.cat_ranges"]["requests"] == 4
    assert read["mome"]["requests"] >= 4
    assert read["botocore.open"]["requests"] == 1
    assert set(listing) == {"mome", "fsspec.ls", "botocore.list_objects_v2"}
    assert all(set(figures) == LIST and figures["requests"] >= 1 for figures in listing.values())
    assert Storage(s3.config).list(s3.url()) == []

    local = bench_storage(str(tmp_path), **small, rounds=1)["read"]
    assert {name: figures["requests"] for name, figures in local.items()} == dict.fromkeys(LOCAL, 0)
    assert list(tmp_path.iterdir()) == []


def test_without_a_url_a_store_is_started_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    started, popen = [], module.subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    assert bench_storage(object_bytes=MIB, objects=2, rounds=1)["store"] == "moto"
    assert [server.poll() is not None for server in started] == [True]


def test_incomplete_reads_and_settings_that_measure_nothing_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "clients_of", lambda target: ({"short": lambda: iter([b"1"])}, {}))
    with pytest.raises(StorageError, match=rf"object: 1 of {SIZE} bytes were read"):
        bench_storage(str(tmp_path), object_bytes=SIZE)
    for setting in ("range_bytes", "rounds"):
        with pytest.raises(ConfigError, match=f"{setting} is 0"):
            bench_storage(str(tmp_path), **{setting: 0})
    assert list(tmp_path.iterdir()) == []
