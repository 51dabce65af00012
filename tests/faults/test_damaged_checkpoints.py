"""Contract C5 under damage: a damaged checkpoint is reported and skipped, in a folder and in object stores."""

import logging
import re
from collections.abc import Callable

import pytest

from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint.committed import COMMIT, MANIFEST
from pipeline.training.checkpoint.store import CheckpointStore
from pipeline.training.collectives import Collectives
from tests.support.small_checkpoint import newest_weight, resume, save

PART = "rank-00000.safetensors"


@pytest.fixture
def local(tmp_path, collectives: Collectives) -> CheckpointStore:
    return CheckpointStore(Storage(), str(tmp_path / "run"), collectives, CheckpointConfig())


@pytest.fixture
def remote(s3, collectives: Collectives) -> CheckpointStore:
    return CheckpointStore(Storage(s3.config), s3.url("run"), collectives, CheckpointConfig(keep=2))


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


@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.parametrize("s3", ["moto"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_reported_and_skipped(
    s3, local: CheckpointStore, remote: CheckpointStore, place: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = local if place == "local" else remote
    message, inflict = DAMAGES[damage]
    first, second = save(store, 10), save(store, 20)
    assert newest_weight(store) == [20, 21, 22, 23]
    inflict(store.storage, second)
    with caplog.at_level(logging.WARNING):
        assert newest_weight(store) == [10, 11, 12, 13]
    assert re.search(rf"skipped: {re.escape(second)}: {message}", caplog.text)
    inflict(store.storage, first)
    assert store.latest() is None, "all are damaged"


def test_any_flipped_byte_of_commit_or_manifest_is_detected(local: CheckpointStore) -> None:
    save(local, 10)
    url = save(local, 20)
    for name in (COMMIT, MANIFEST):
        whole = local.storage.read(join(url, name))
        for place in range(len(whole)):
            flip(local.storage, join(url, name), place)
            checkpoint, _ = local.latest() or pytest.fail("nothing found")
            assert checkpoint.step == 10, f"byte {place} of {name}"
            local.storage.write(join(url, name), whole)
    assert newest_weight(local) == [20, 21, 22, 23]


def test_stores_keep_the_newest_and_skip_damaged_checkpoints(remote: CheckpointStore) -> None:
    first, second, third = [save(remote, step) for step in (10, 20, 30)]
    assert newest_weight(remote) == [30, 31, 32, 33]
    assert not remote.storage.exists(first)
    assert all(remote.storage.exists(join(url, COMMIT)) for url in (second, third))
    remote.storage.delete(join(third, COMMIT))
    assert newest_weight(remote) == [20, 21, 22, 23]
    flip(remote.storage, join(save(remote, 40), PART), -1)
    assert newest_weight(remote) == [20, 21, 22, 23]


@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_only_partial_checkpoints_are_removed_later(
    s3, local: CheckpointStore, remote: CheckpointStore, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that is killed while it writes leaves files of ranks without a commit; other files are not its own."""
    store = local if place == "local" else remote
    save(store, 10)
    before, beyond, unfinished = (
        join(store.url, f"step-{name}") for name in ("00000010.a", "00000020.b", "00000006.c")
    )
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
def test_parts_of_dead_uploads_are_removed_at_start(s3, remote: CheckpointStore) -> None:
    import botocore.session

    options = {"endpoint_url": s3.endpoint, "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    client = botocore.session.get_session().create_client("s3", region_name="us-east-1", **options)
    bucket, key = remote.url.removeprefix("s3://").split("/", 1)
    ours, other = f"{key}/step-00000030.0d0d/{PART}", "another-run/checkpoints/step-00000030.0d0d/x"
    for name in (ours, other):
        upload = client.create_multipart_upload(Bucket=bucket, Key=name)["UploadId"]
        client.upload_part(Bucket=bucket, Key=name, UploadId=upload, PartNumber=1, Body=b"half")
    assert resume(remote) is None
    assert [upload_info["Key"] for upload_info in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [other]
