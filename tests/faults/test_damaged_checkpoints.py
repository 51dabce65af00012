"""Contract C5 under damage: a damaged checkpoint is reported and skipped, in a folder and in an object store."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest

from pipeline.config.schema import CheckpointConfig
from pipeline.data.storage import Storage, join
from pipeline.training.checkpoint import COMMIT, MANIFEST, CheckpointStore
from pipeline.training.collectives import Collectives
from tests.support.small_checkpoint import newest_weight, save

PART = "rank-00000.safetensors"


@pytest.fixture(params=["local", "moto"])
def store(request: pytest.FixtureRequest, tmp_path, monkeypatch, collectives: Collectives) -> CheckpointStore:
    """Return the checkpoint store of an empty run, in a folder or in an object store."""
    storage, folder = Storage(), str(tmp_path / "run")
    if request.param == "moto":
        storage, folder = in_object_store(request, monkeypatch)
    return CheckpointStore(storage, folder, collectives, CheckpointConfig())


def in_object_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, str]:
    import botocore.session

    from pipeline.config.schema import StorageConfig

    store = request.getfixturevalue("moto_store")
    for name, value in {**store.environment, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    bucket = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:60]
    botocore.session.get_session().create_client("s3").create_bucket(Bucket=bucket)
    return Storage(StorageConfig(retry_timeout_seconds=20.0)), f"s3://{bucket}/run"


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
    "a flipped byte in the manifest": (rf"{MANIFEST} is damaged", lambda s, url: flip(s, join(url, MANIFEST), 40)),
    "a flipped bit of a digit in the manifest": (
        rf"{MANIFEST} is damaged",
        lambda s, url: flip(s, join(url, MANIFEST), s.read(join(url, MANIFEST)).index(b'"step": 20') + 8),
    ),
    "a cut file": (rf"{PART} is damaged: expected \d+ bytes.*found \d+ bytes", lambda s, url: cut(s, join(url, PART))),
    "a cut manifest": (rf"{MANIFEST} is damaged", lambda s, url: cut(s, join(url, MANIFEST))),
    "a cut commit": (rf"{COMMIT} is damaged", lambda s, url: cut(s, join(url, COMMIT))),
    "an empty commit": (rf"{COMMIT} is damaged", lambda s, url: s.write(join(url, COMMIT), b"")),
    "a missing file": (rf"{PART} is missing", lambda s, url: s.delete(join(url, PART))),
    "a missing manifest": (rf"{MANIFEST} is missing", lambda s, url: s.delete(join(url, MANIFEST))),
    "a missing commit": (rf"not committed \(no {COMMIT}\)", lambda s, url: s.delete(join(url, COMMIT))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_reported_and_skipped(
    store: CheckpointStore, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    message, inflict = DAMAGES[damage]
    save(store, 10)
    url = save(store, 20)
    assert newest_weight(store) == [20, 21, 22, 23]
    inflict(store.storage, url)
    with caplog.at_level(logging.WARNING):
        assert newest_weight(store) == [10, 11, 12, 13]
    assert re.search(rf"skipped: {re.escape(url)}: {message}", caplog.text)


def test_any_flipped_byte_of_commit_or_manifest_is_detected(tmp_path, collectives: Collectives) -> None:
    store = CheckpointStore(Storage(), str(tmp_path), collectives, CheckpointConfig())
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


def test_no_checkpoint_is_used_when_all_are_damaged(store: CheckpointStore) -> None:
    for step in (10, 20):
        flip(store.storage, join(save(store, step), PART), -1)
    assert store.latest() is None


def test_partial_checkpoints_are_skipped_and_later_removed(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that is killed while it writes leaves files of ranks without a commit."""
    save(store, 10)
    before, beyond = join(store.url, "step-00000010.0a0a"), join(store.url, "step-00000020.0b0b")
    for url in (before, beyond):
        store.storage.write(join(url, PART), b"half of it")
        store.storage.write(join(url, "rank-00001.json"), b"{}")
    with caplog.at_level(logging.WARNING):
        assert newest_weight(store) == [10, 11, 12, 13]
        store.remove_unfinished()
    assert not store.storage.exists(before)
    assert store.storage.exists(beyond), "the work of another attempt, perhaps still alive, was removed"
    assert f"{before}: removed an unfinished checkpoint" in caplog.text
    save(store, 20)
    assert not store.storage.exists(beyond)
    assert newest_weight(store) == [20, 21, 22, 23]


def test_foreign_files_are_never_removed(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    save(store, 10)
    kept = [join(store.url, "step-00000005.copy", PART), join(store.url, "notes.txt")]
    unfinished = join(store.url, "step-00000006.0c0c")
    kept.append(join(unfinished, "my-notes.txt"))
    for url in [*kept, join(unfinished, PART)]:
        store.storage.write(url, b"mine")
    with caplog.at_level(logging.WARNING):
        save(store, 20)
    assert all(store.storage.read(url) == b"mine" for url in kept)
    assert not store.storage.exists(join(unfinished, PART))
    assert "not removed, because it contains other files: my-notes.txt" in caplog.text


@pytest.mark.parametrize("store", ["moto"], indirect=True)
def test_parts_of_dead_uploads_are_removed_at_start(store: CheckpointStore) -> None:
    import botocore.session

    client = botocore.session.get_session().create_client("s3")
    bucket, key = store.url.removeprefix("s3://").split("/", 1)
    ours, other = f"{key}/step-00000030.0d0d/{PART}", "another-run/checkpoints/step-00000030.0d0d/x"
    for name in (ours, other):
        upload = client.create_multipart_upload(Bucket=bucket, Key=name)["UploadId"]
        client.upload_part(Bucket=bucket, Key=name, UploadId=upload, PartNumber=1, Body=b"half")
    assert store.latest() is None
    store.remove_unfinished()
    assert [upload_info["Key"] for upload_info in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [other]
