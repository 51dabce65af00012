"""Streaming from an S3 store equals streaming from a folder, and every fault of a store is reported by name.

The `s3` fixture runs each test on moto's server and on OpenStack Swift, whose responses differ where the API allows.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
from itertools import islice
from pathlib import Path

import pytest

from pipeline.config.errors import DataError, StorageError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import Loader, fingerprint
from pipeline.data.order import SampleRef
from pipeline.data.reading.samples import SampleReader, iter_captions
from pipeline.data.shards.manifest import index_shards, load_manifest
from pipeline.data.shards.source import Source
from pipeline.data.storage import NotFound, ObjectChanged, ObjectInfo, Storage, join
from pipeline.data.storage import s3 as module
from pipeline.data.storage.retry import RetryBudget
from pipeline.objectives import batch_groups


@pytest.fixture
def storage(s3) -> Storage:
    return Storage(s3.config)


def run_config(shards: str, config: StorageConfig, workers: int = 0, threads: int = 2) -> RunConfig:
    stage = {"name": "pairs", "sources": {"pairs": 1.0}, "steps": 50, "global_batch_size": 8, "max_text_length": 12}
    values = {
        "name": "test",
        "storage": config.model_dump(),
        "model": {"width": 32, "layers": 3, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 4},
        "sources": {"pairs": {"shards": shards}},
        "data": {"streams": 4, "shuffle_window": 2, "loader": {"num_workers": workers, "threads_per_worker": threads}},
        "stages": [stage | {"objectives": {"itc": {}, "mlm": {}}}],
    }
    return validate(values, "test")


def copy(storage: Storage, folder: str, url: str) -> None:
    for name in sorted(os.listdir(folder)):
        storage.upload(Path(folder, name), join(url, name))


def test_s3_equals_local_for_every_world_size(s3, storage, make_pairs):
    folder, url = make_pairs("pairs", [9, 4, 10]), s3.url("data", "pairs")
    copy(storage, folder, url)
    local, remote = index_shards(Storage(), folder), index_shards(storage, url)
    assert local.digest == remote.digest == load_manifest(storage, url).digest
    captions = list(iter_captions(storage, url))
    assert captions == list(iter_captions(Storage(), folder))
    tokenizer = Tokenizer.train(captions, 200)
    prints, digests = set(), set()
    for shards, config, world, workers, threads in (
        (folder, StorageConfig(), 1, 0, 1),
        (url, s3.config, 1, 0, 4),
        (url, s3.config, 3, 1, 1),
        (url + "/{00000..00002}.tar", s3.config, 2, 0, 2),
    ):
        run = run_config(shards, config, workers, threads)
        prints.add(
            fingerprint(
                run, run.stages[0], batch_groups(run, run.stages[0]), Storage(config), tokenizer, range(1, 5), world
            )
        )
        with Loader(
            run, run.stages[0], batch_groups(run, run.stages[0]), Storage(config), tokenizer, rank=0, world_size=1
        ) as loader:
            digests.add(loader.digest)
    assert len(prints) == len(digests) == 1


def test_objects_are_written_read_listed_and_deleted(s3, storage, tmp_path: Path):
    data = os.urandom(300_000)
    storage.write(s3.url("run", "a.bin"), data)
    storage.write(s3.url("run", "deep", "b.bin"), b"b")
    storage.write(s3.url("run2", "a.bin"), b"c")
    assert storage.read(s3.url("run", "a.bin")) == data
    assert storage.read_range(s3.url("run", "a.bin"), 1000, 250_000) == data[1000:250_000]
    assert storage.info(s3.url("run", "a.bin")).size == len(data)
    assert storage.list(s3.url("run")) == ["a.bin", "deep"]
    assert storage.list(s3.url()) == ["run", "run2"]
    assert storage.list(s3.url("absent")) == []
    assert storage.exists(s3.url("run"))
    assert storage.exists(s3.url("run", "a.bin"))
    assert not storage.exists(s3.url("ru"))
    assert storage.read(s3.url("run", "a.bin")) == data
    storage.delete(s3.url("run"))
    storage.delete(s3.url("run"))
    assert storage.list(s3.url()) == ["run2"]


def test_empty_objects_and_names_with_spaces(s3, storage):
    for name, data in (("empty", b""), ("größe x+y%20&z.tar", b"12345")):
        url = s3.url("folder", name)
        storage.write(url, data)
        assert storage.read(url) == data
        assert storage.info(url) == storage.list_info(s3.url("folder"))[name]
        assert storage.info(url).size == len(data)
        storage.delete(url)
        assert storage.list(s3.url("folder")) == []


def test_missing_objects_need_no_second_attempt(s3, monkeypatch: pytest.MonkeyPatch):
    """Swift ends a HEAD's 404 with unexpected bytes, which must not corrupt the next response."""

    def refuse(patience: RetryBudget, error: Exception) -> None:
        raise error

    monkeypatch.setattr(RetryBudget, "wait", refuse)
    storage = Storage(s3.config)
    storage.write(s3.url("folder", "key"), b"1")
    for _ in range(3):
        assert not storage.exists(s3.url("none"))
        with pytest.raises(NotFound, match=r"none: checking failed: it does not exist"):
            storage.info(s3.url("none"))
        with pytest.raises(NotFound, match=r"no-such-bucket.* does not exist"):
            storage.info("s3://no-such-bucket/key")
        assert storage.exists(s3.url("folder"))
        assert storage.read(s3.url("folder", "key")) == b"1"


def test_listings_and_deletions_span_pages(s3, storage, monkeypatch: pytest.MonkeyPatch):
    for number in range(7):
        storage.write(s3.url("many", f"{number}.tar"), b"x")
    monkeypatch.setattr(module, "PAGE_SIZE", 3)
    assert storage.list(s3.url("many")) == [f"{number}.tar" for number in range(7)]
    storage.delete(s3.url("many"))
    assert storage.list(s3.url()) == []


def test_large_files_are_uploaded_in_parts(s3, storage, tmp_path: Path):
    data = os.urandom(2**20) * 40
    (tmp_path / "large").write_bytes(data)
    storage.upload(tmp_path / "large", s3.url("large"))
    with storage.open(s3.url("large")) as stream:
        assert stream.read() == data
    tag = storage.info(s3.url("large")).etag
    assert storage.list_info(s3.url()) == {"large": ObjectInfo(len(data), tag)}
    edge = module.PART_BYTES  # of the first part
    assert storage.read_range(s3.url("large"), edge - 9, edge + 9, etag=tag) == data[edge - 9 : edge + 9]
    with pytest.raises(ObjectChanged):
        storage.read_range(s3.url("large"), 0, 9, etag=f"{tag}0")


def test_shard_replaced_during_the_run_is_rejected_by_name(s3, storage, make_pairs):
    url = s3.url("pairs")
    copy(storage, make_pairs("pairs", [5, 4]), url)
    reader = SampleReader(storage, {"pairs": Source(url, index_shards(storage, url))})
    reader.read(SampleRef("pairs", 0, 0, 1))
    data = bytearray(storage.read(join(url, "00001.tar")))
    data[600] ^= 1
    storage.write(join(url, "00001.tar"), bytes(data))
    with pytest.raises(DataError, match=r"00001\.tar: the shard was changed: it was replaced while the run read it"):
        reader.read(SampleRef("pairs", 0, 1, 1))
    with pytest.raises(DataError, match=r"00001\.tar: the shard was changed: sample 'pairs00005'"):
        SampleReader(storage, {"pairs": Source(url, load_manifest(storage, url))}).read(SampleRef("pairs", 0, 1, 0))


def test_truncated_shard_is_rejected_by_name(s3, storage, make_pairs):
    url = s3.url("pairs")
    copy(storage, make_pairs("pairs", [5, 4]), url)
    manifest = index_shards(storage, url)
    whole = storage.read(join(url, "00001.tar"))
    for stop in (200, 900, 1536, len(whole) - 512):
        storage.write(join(url, "00001.tar"), whole[:stop])
        with pytest.raises(DataError, match=r"00001\.tar: the shard was truncated"):
            SampleReader(storage, {"pairs": Source(url, manifest)})
    storage.write(join(url, "00001.tar"), whole[:900])
    with pytest.raises(DataError, match=r"00001\.tar: the shard is truncated"):
        index_shards(storage, url)


def test_reads_with_an_etag_detect_changes(s3, storage):
    storage.write(s3.url("key"), b"12345")
    tag = storage.info(s3.url("key")).etag
    assert storage.read_range(s3.url("key"), 1, 3, etag=tag) == b"23"
    storage.write(s3.url("key"), b"54321")
    with pytest.raises(ObjectChanged, match=r"key: .*replaced while it was in use"):
        storage.read_range(s3.url("key"), 1, 3, etag=tag)


def test_absent_bucket_is_named(s3, storage):
    for call in (storage.list, storage.read, storage.exists, lambda url: storage.write(url, b"x")):
        with pytest.raises(NotFound, match=r"bucket 'no-such-bucket' does not exist at http"):
            call("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match=r"no-such-bucket"):
        load_manifest(storage, "s3://no-such-bucket/pairs")


def test_missing_object_and_short_range_are_named(s3, storage):
    with pytest.raises(NotFound, match=r"none: reading failed: it does not exist"):
        storage.read(s3.url("none"))
    storage.write(s3.url("short"), b"12345")
    with pytest.raises(StorageError, match=r"short: .*too short: it holds 5 bytes"):
        storage.read_range(s3.url("short"), 2, 9)
    with pytest.raises(DataError, match=r"empty: no such folder of shards"):
        load_manifest(storage, s3.url("empty"))


def test_unreachable_endpoint_is_named():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # bound and not listening: connections are refused
        os.environ.setdefault("MOME_TEST_KEY", "k")
        config = StorageConfig(
            endpoint_url=f"http://127.0.0.1:{port}",
            key="env:MOME_TEST_KEY",
            secret="env:MOME_TEST_KEY",
            retry_timeout_seconds=2.0,
        )
        with pytest.raises(
            StorageError, match=rf"the store did not answer at http://127\.0\.0\.1:{port}.*endpoint_url"
        ):
            Storage(config).read("s3://bucket/key")


def _read_in_child(storage: Storage, url: str, queue) -> None:
    queue.put(storage.read(url))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_their_own_connections(s3, storage, method: str):
    storage.write(s3.url("key"), b"value")
    assert storage.read(s3.url("key")) == b"value"
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(storage, s3.url("key"), queue))
    child.start()
    assert queue.get(timeout=60) == b"value"
    child.join(10)
    assert child.exitcode == 0
    assert storage.read(s3.url("key")) == b"value" == pickle.loads(pickle.dumps(storage)).read(s3.url("key"))  # noqa: S301


def test_loader_streams_many_batches(s3, storage, make_pairs):
    url = s3.url("pairs")
    copy(storage, make_pairs("pairs", [9, 4, 10]), url)
    index_shards(storage, url)
    run = run_config(url, s3.config)
    tokenizer = Tokenizer.train(iter_captions(storage, url), 200)
    with Loader(
        run, run.stages[0], batch_groups(run, run.stages[0]), storage, tokenizer, rank=1, world_size=3
    ) as loader:
        batches = list(islice(loader.batches(0), 23))
    assert {uid for batch in batches for uid in batch.uid.tolist()}
    assert all(len(batch) == 3 for batch in batches)
