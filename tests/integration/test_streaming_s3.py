"""Streaming from an S3 store equals streaming from a folder, and every fault of a store is reported by name.

The `s3` fixture runs a test on moto's server and on OpenStack Swift, whose responses differ where the API allows; Swift
is started and stopped by infra/swift.sh.
"""

import os
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from pipeline.config.errors import DataError, StorageError
from pipeline.config.schema import StorageConfig
from pipeline.data.order import SampleRef
from pipeline.data.reading.cache import NodeCache
from pipeline.data.reading.samples import SampleReader, iter_captions
from pipeline.data.shards.manifest import index_shards, load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import NotFound, Storage, join
from pipeline.data.storage import s3 as module
from pipeline.data.storage.retry import RetryBudget
from tests.support.data_stream import copy_shards, hash_of, open_loader, stream_config
from tests.support.stores import SWIFT


@pytest.fixture
def storage(s3) -> Storage:
    return Storage(s3.config)


def test_s3_equals_local_for_every_world_size(s3, storage, make_pairs):
    folder = make_pairs("pairs", [9, 4, 10])
    url = copy_shards(folder, s3, "data/pairs")
    assert load_manifest(Storage(), folder).digest == index_shards(storage, url).digest
    assert list(iter_captions(storage, url)) == list(iter_captions(Storage(), folder))
    read = set()
    for shards, world, workers, threads in (
        (folder, 1, 0, 1), (url, 1, 0, 4), (url, 3, 1, 1), (url + "/{00000..00002}.tar", 2, 0, 2)
    ):  # fmt: skip
        run = stream_config(shards, StorageConfig() if shards == folder else s3.config)
        with open_loader(run) as loader:
            read.add((loader.digest, hash_of(run, range(1, 5), world, num_workers=workers, threads_per_worker=threads)))
    assert len(read) == 1


def test_pages_prefixes_and_odd_keys_are_listed_read_and_deleted(s3, storage, monkeypatch):
    monkeypatch.setattr(module, "PAGE_SIZE", 3)
    for name in (names := [f"{number}.tar" for number in range(7)]):
        storage.write(s3.url("many", name), b"x")
    assert storage.list(s3.url("many")) == names
    storage.delete(s3.url("many"))
    for parts in (("run", "a.bin"), ("run", "deep", "b.bin"), ("run2", "a.bin")):
        storage.write(s3.url(*parts), b"x")
    listed = [storage.list(s3.url(*parts)) for parts in (["run"], [], ["absent"])]
    assert listed == [["a.bin", "deep"], ["run", "run2"], []]
    assert [storage.exists(s3.url(*parts)) for parts in (["run"], ["run", "a.bin"], ["ru"])] == [True, True, False]
    for _ in range(2):
        storage.delete(s3.url("run"))
        assert storage.list(s3.url()) == ["run2"]
    for name, content in (("empty", b""), ("größe x+y%20&z.tar", b"12345")):
        url = s3.url("folder", name)
        storage.write(url, content)
        assert storage.read(url) == content
        assert storage.list_info(s3.url("folder")) == {name: storage.info(url)}
        assert storage.info(url).size == len(content)
        storage.delete(url)
        assert storage.list(s3.url("folder")) == []


def test_missing_objects_need_no_second_attempt(s3, storage, monkeypatch: pytest.MonkeyPatch):
    """Swift ends a HEAD's 404 with unexpected bytes, which must not corrupt the next response."""

    def refuse(budget: RetryBudget, error: Exception) -> None:
        raise error

    monkeypatch.setattr(RetryBudget, "wait", refuse)
    storage.write(s3.url("folder", "key"), b"12345")
    bucket = r"bucket 'no-such-bucket' does not exist at http"
    for _ in range(3):
        assert not storage.exists(s3.url("none"))
        for call, action in ((storage.info, "checking"), (storage.read, "reading")):
            with pytest.raises(NotFound, match=rf"none: {action} failed: it does not exist"):
                call(s3.url("none"))
        with pytest.raises(StorageError, match=r"key: .*too short: it holds 5 bytes"):
            storage.read(s3.url("folder", "key"), 2, 9)
        with pytest.raises(NotFound, match=r"no-such-bucket.* does not exist"):
            storage.info("s3://no-such-bucket/key")  # a response without a body does not name the bucket
        for call in (storage.list, storage.read, storage.exists):
            with pytest.raises(NotFound, match=bucket):
                call("s3://no-such-bucket/x")
        assert storage.exists(s3.url("folder"))
        assert storage.read(s3.url("folder", "key")) == b"12345"
    with pytest.raises(DataError, match=r"empty: no such folder of shards"):
        load_manifest(storage, s3.url("empty"))
    # Last, because Swift closes the connection after a rejected body, and the next request may notice it too late.
    with pytest.raises(NotFound, match=bucket):
        storage.write("s3://no-such-bucket/x", b"x")


def test_replaced_and_truncated_shards_are_rejected_by_name(s3, storage, make_pairs, tmp_path: Path):
    url = copy_shards(make_pairs("pairs", [5, 4]), s3)
    manifest, shard = load_manifest(storage, url), join(url, "00001.tar")
    refs, source = [SampleRef("pairs", 0, number, 1) for number in range(2)], {"pairs": Source(url, manifest)}
    readers = [SampleReader(storage, source, cache=cache) for cache in (None, NodeCache(tmp_path / "cache", 2**30))]
    whole = storage.read(shard)
    storage.write(shard, whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    for reader in readers:
        reader.start_prefetch(lambda step: refs if step == 0 else [], 0)
        reader.read(refs[0])
        with pytest.raises(DataError, match=r"00001\.tar: .* changed: it was replaced while the run read it"):
            reader.read(refs[1])
        reader.close()
    with pytest.raises(DataError, match=r"00001\.tar: the shard was changed: sample 'pairs00005'"):
        SampleReader(storage, {"pairs": Source(url, manifest)}).read(SampleRef("pairs", 0, 1, 0))
    for stop in (200, 1536, len(whole) - 512, 900):
        storage.write(shard, whole[:stop])
        with pytest.raises(DataError, match=r"00001\.tar: the shard was truncated"):
            SampleReader(storage, {"pairs": Source(url, manifest)})
    with pytest.raises(DataError, match=r"00001\.tar: the shard is truncated"):
        index_shards(storage, url)


def swift(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", str(SWIFT), *map(str, arguments)]
    return subprocess.run(command, env=environment or None, capture_output=True, text=True, timeout=120)


def count_processes(folder: Path) -> int:
    return sum(str(folder) in str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"]))


def test_stopped_store_leaves_no_process_and_no_port(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    started = swift("start", folder)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip())
    try:
        settings = dict(word.split("=", 1) for word in started.stdout.split()[1:])
        assert set(settings) == {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        url = urlsplit(settings["AWS_ENDPOINT_URL"])
        socket.create_connection(address := (url.hostname, url.port)).close()
        assert count_processes(folder) == 5
        again = swift("start", folder)
        assert (again.returncode, "a store runs in" in again.stderr, count_processes(folder)) == (1, True, 5)
    finally:
        assert swift("stop", folder).returncode == 0
    assert count_processes(folder) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    assert list(folder.glob("*.pid")) == []


def test_message_without_swift_names_the_installation(tmp_path: Path) -> None:
    refused = swift("start", tmp_path / "store", PATH="/nonexistent", HOME=os.environ.get("HOME", "/"))
    assert refused.returncode == 3
    assert "Swift is not installed; as root: infra/swift.sh install" in refused.stderr
    assert not (tmp_path / "store").exists()
