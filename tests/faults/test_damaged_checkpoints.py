"""Contract C5 under damage: a damaged checkpoint is reported and skipped, in a folder and in object stores."""

import logging
import re
from collections.abc import Callable

import pytest

from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage, join
from pipeline.data.storage.s3 import make_client
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.collectives import Collectives
from tests.support.small_checkpoint import newest_weight, resume, save

PART = "rank-00000.safetensors"


EVERYWHERE = pytest.mark.parametrize(("store", "s3"), [("folder", "moto"), ("s3", "moto")], indirect=True)


@pytest.fixture
def store(request: pytest.FixtureRequest, s3, tmp_path, collectives: Collectives) -> CheckpointStore:
    is_local = getattr(request, "param", "s3") == "folder"
    storage, url = (Storage(), str(tmp_path / "run")) if is_local else (Storage(s3.config), s3.url("run"))
    return CheckpointStore(storage, url, collectives, CheckpointConfig(keep=2))


def flip(storage: Storage, url: str, place: int) -> None:
    data = bytearray(storage.read(url))
    data[place] ^= 1
    storage.write(url, bytes(data))


def cut(storage: Storage, url: str) -> None:
    data = storage.read(url)
    storage.write(url, data[: len(data) // 2])


DAMAGES: dict[str, tuple[str, Callable[[Storage, str], None]]] = {
    "a flipped byte in a rank's file": (rf"{PART} is damaged", lambda s, url: flip(s, join(url, PART), -1)),
    "a flipped byte in its header": (rf"{PART} is damaged", lambda s, url: flip(s, join(url, PART), 12)),
    "a cut file": (rf"{PART} is damaged: expected \d+ bytes.*found \d+ bytes", lambda s, url: cut(s, join(url, PART))),
    "a cut manifest": (rf"{MANIFEST} is damaged", lambda s, url: cut(s, join(url, MANIFEST))),
    "a cut commit": (rf"{COMMIT} is damaged", lambda s, url: cut(s, join(url, COMMIT))),
    "an empty commit": (rf"{COMMIT} is damaged", lambda s, url: s.write(join(url, COMMIT), b"")),
    "a missing file": (rf"{PART} is missing", lambda s, url: s.delete(join(url, PART))),
    "a missing manifest": (rf"{MANIFEST} is missing", lambda s, url: s.delete(join(url, MANIFEST))),
    "a missing commit": (rf"not committed \(no {COMMIT}\)", lambda s, url: s.delete(join(url, COMMIT))),
}


@EVERYWHERE
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_reported_and_skipped(store: CheckpointStore, damage: str, caplog) -> None:
    message, inflict = DAMAGES[damage]
    first, second = save(store, 10), save(store, 20)
    assert newest_weight(store) == [20, 21, 22, 23]
    inflict(store.storage, second)
    with caplog.at_level(logging.WARNING):
        assert newest_weight(store) == [10, 11, 12, 13]
    assert re.search(rf"skipped: {re.escape(second)}: {message}", caplog.text)
    inflict(store.storage, first)
    assert store.latest() is None, "all are damaged"


@pytest.mark.parametrize(("store", "s3"), [("folder", "moto")], indirect=True)
def test_any_flipped_byte_of_commit_or_manifest_is_detected(store: CheckpointStore) -> None:
    save(store, 10)
    url = save(store, 20)
    for name in (COMMIT, MANIFEST):
        whole = store.storage.read(join(url, name))
        for place in range(len(whole)):
            flip(store.storage, join(url, name), place)
            checkpoint, _ = store.latest() or pytest.fail("nothing found")
            assert checkpoint.step == 10, f"byte {place} of {name}"
            store.storage.write(join(url, name), whole)
    assert newest_weight(store) == [20, 21, 22, 23]


def test_stores_keep_the_newest_and_skip_damaged_checkpoints(store: CheckpointStore) -> None:
    urls = [save(store, step) for step in (10, 20, 30)]
    assert newest_weight(store) == [30, 31, 32, 33]
    assert not store.storage.exists(urls[0])
    assert [store.storage.exists(join(url, COMMIT)) for url in urls[1:]] == [True, True]
    store.storage.delete(join(urls[2], COMMIT))
    assert newest_weight(store) == [20, 21, 22, 23]
    flip(store.storage, join(save(store, 40), PART), -1)
    assert newest_weight(store) == [20, 21, 22, 23]


@EVERYWHERE
def test_only_partial_checkpoints_are_removed_later(store: CheckpointStore, caplog) -> None:
    """A run that is killed while it writes leaves files of ranks without a commit; other files are not its own."""
    save(store, 10)
    before, beyond, unfinished = (join(store.url, f"step-000000{name}") for name in ("10.a", "20.b", "06.c"))
    foreign = [join(store.url, "step-00000005.copy", PART), join(store.url, "notes.txt"), f"{unfinished}/my-notes.txt"]
    parts = [join(url, name) for url in (before, beyond) for name in (PART, "rank-00001.json")]
    for url in (*foreign, *parts, join(unfinished, PART)):
        store.storage.write(url, b"mine")
    with caplog.at_level(logging.WARNING):
        assert newest_weight(store) == [10, 11, 12, 13]
        resume(store)
    assert not store.storage.exists(before)
    assert store.storage.exists(beyond), "the work of another attempt, perhaps still alive, was removed"
    assert f"{before}: removed an unfinished checkpoint" in caplog.text
    assert "not removed, because it contains other files: my-notes.txt" in caplog.text
    save(store, 20)
    assert not store.storage.exists(beyond)
    assert newest_weight(store) == [20, 21, 22, 23]
    assert all(store.storage.read(url) == b"mine" for url in foreign)
    assert not store.storage.exists(join(unfinished, PART))


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_parts_of_dead_uploads_are_removed_at_start(s3, store: CheckpointStore) -> None:
    client, at = make_client(s3.config), {"Bucket": s3.bucket}
    ours, other = (f"{run}/checkpoints/step-00000030.0d0d/{PART}" for run in ("run", "another-run"))
    for name in (ours, other):
        upload = client.create_multipart_upload(**at, Key=name)["UploadId"]
        client.upload_part(**at, Key=name, UploadId=upload, PartNumber=1, Body=b"half")
    assert resume(store) is None
    assert [unfinished["Key"] for unfinished in client.list_multipart_uploads(**at)["Uploads"]] == [other]
