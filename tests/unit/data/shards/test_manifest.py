"""The manifest of a folder lists its shards exactly, and replaced, lost or truncated shards are detected."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError, DataError, StorageError
from pipeline.data.shards.index import ShardIndex
from pipeline.data.shards.manifest import (
    Manifest,
    ShardRecord,
    check_present,
    ensure_indexed,
    expand_braces,
    index_shards,
    load_index,
    load_manifest,
)
from pipeline.data.storage import Storage
from tests.support.fuzz import fuzz_rounds, mutate


class Watched(Storage):
    """Storage that records the files that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def open(self, url: str):
        self.seen.append(Path(url).name)
        return super().open(url)

    def read(self, url: str) -> bytes:
        self.seen.append(Path(url).name)
        return super().read(url)


def empty_tar() -> bytes:
    buffer = io.BytesIO()
    tarfile.open(fileobj=buffer, mode="w").close()
    return buffer.getvalue()


def test_indexing_leaves_the_tars_unchanged(make_pairs, tmp_path: Path):
    storage, folder = Storage(), make_pairs("pairs", [5, 3])
    before = {name: (Path(folder) / name).read_bytes() for name in os.listdir(folder)}
    manifest = index_shards(storage, folder)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("00000.tar", 5), ("00001.tar", 3)]
    assert manifest.num_samples == 8
    assert {name: (Path(folder) / name).read_bytes() for name in before} == before
    assert load_manifest(storage, folder) == manifest
    assert [len(load_index(storage, folder, record)) for record in manifest.shards] == [5, 3]


def test_interrupted_indexing_continues(make_pairs):
    storage, folder = Storage(), make_pairs("pairs", [5, 3, 4])
    manifest = index_shards(storage, folder)
    for name in ("manifest.json", "00002.tar.index.npz"):
        os.unlink(f"{folder}/{name}")
    (Path(folder) / "00001.tar.index.npz").write_bytes(b"half an index")
    watched = Watched()
    assert index_shards(watched, folder) == manifest
    assert sorted(name for name in watched.seen if name.endswith(".tar")) == ["00001.tar", "00002.tar"]


def test_digest_depends_on_contents_only(make_pairs, make_tar, make_pair):
    storage = Storage()
    first = index_shards(storage, make_pairs("pairs", [5, 3]))
    shutil.copytree(Path(make_pairs("copied", [])).parent / "pairs", Path(make_pairs("copies", [])) / "in")
    folder = str(Path(make_pairs("more", [])).parent / "copies" / "in")
    assert index_shards(storage, folder).digest == first.digest
    (Path(folder) / "00001.tar").write_bytes(make_tar({str(n): make_pair(n) for n in range(3)}))
    assert index_shards(storage, folder).digest != first.digest


def test_brace_patterns_select_shards(make_pairs):
    storage, folder = Storage(), make_pairs("pairs", [2, 3, 4])
    index_shards(storage, folder)
    manifest = load_manifest(storage, f"{folder}/0000{{1..2}}.tar")
    assert [shard.samples for shard in manifest.shards] == [3, 4]
    assert load_manifest(storage, f"{folder}/00000.tar").num_samples == 2
    with pytest.raises(DataError, match=r"00003\.tar is not in"):
        load_manifest(storage, f"{folder}/{{00000..00003}}.tar")


def test_braces_expand():
    assert expand_braces("a-{08..11}.{x,y}") == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_missing_parts_name_the_command_to_run(tmp_path: Path):
    storage = Storage()
    with pytest.raises(DataError, match=r"no such folder of shards.*mome shards build"):
        load_manifest(storage, str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no manifest\.json in it.*mome shards index"):
        load_manifest(storage, str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no \.tar files there"):
        index_shards(storage, str(tmp_path / "empty"))
    (tmp_path / "empty" / "x.tgz").write_bytes(gzip.compress(empty_tar()))
    with pytest.raises(DataError, match=r"no \.tar files there\. Unpack x\.tgz"):
        index_shards(storage, str(tmp_path / "empty"))
    (tmp_path / "empty" / "y.tar").write_bytes(empty_tar())
    with pytest.raises(DataError, match=r"x\.tgz would not be read along with y\.tar\. Unpack x\.tgz"):
        index_shards(storage, str(tmp_path / "empty"))
    index_shards(storage, str(tmp_path / "empty" / "{y}.tar"))
    (tmp_path / "empty" / "x.tar").write_bytes(empty_tar())
    (tmp_path / "empty" / "z.TAR").write_bytes(empty_tar())
    with pytest.raises(DataError, match=r"z\.TAR would not be read along with x\.tar\. Rename z\.TAR"):
        index_shards(storage, str(tmp_path / "empty"))
    (tmp_path / "empty" / "z.TAR").unlink()
    (tmp_path / "empty" / "lost.tar").symlink_to("absent.tar")
    with pytest.raises(DataError, match=r"lost\.tar: a link to a file that does not exist"):
        index_shards(storage, str(tmp_path / "empty"))
    (tmp_path / "empty" / "lost.tar").unlink()
    index_shards(storage, str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"have no samples"):
        load_manifest(storage, str(tmp_path / "empty"))


def test_edited_manifest_and_foreign_index_are_rejected(make_pairs):
    storage, folder = Storage(), make_pairs("pairs", [5, 3])
    manifest = index_shards(storage, folder)
    shutil.copy(f"{folder}/00000.tar.index.npz", f"{folder}/00001.tar.index.npz")
    with pytest.raises(DataError, match=r"00001\.tar\.index\.npz: belongs to another version"):
        load_index(storage, folder, manifest.shards[1])
    content = json.loads(Path(folder, "manifest.json").read_text())
    content["shards"][0]["samples"] = 50
    Path(folder, "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"edited or damaged"):
        load_manifest(storage, folder)


def test_one_listing_finds_missing_and_truncated_shards(make_pairs):
    storage, folder = Storage(), make_pairs("pairs", [5, 3])
    manifest = index_shards(storage, folder)
    check_present(storage, folder, manifest)
    os.truncate(f"{folder}/00001.tar", 4096)
    with pytest.raises(DataError, match=r"00001\.tar: the shard was truncated: 4096 bytes"):
        check_present(storage, folder, manifest)
    os.unlink(f"{folder}/00000.tar")
    with pytest.raises(DataError, match=r"00000\.tar: the shard is missing"):
        check_present(storage, folder, manifest)


def test_known_shards_are_not_read_again(make_pairs):
    folder = make_pairs("many", [1] * 300)
    calls = []
    manifest = index_shards(Storage(), folder, lambda *progress: calls.append(progress))
    assert [done for done, total, _ in calls] == list(range(1, 301))
    assert {total for _, total, _ in calls} == {300}
    assert {name for _, _, name in calls} == {shard.name for shard in manifest.shards}
    for call in (index_shards, ensure_indexed, load_manifest):
        watched = Watched()
        assert call(watched, folder) == manifest
        assert watched.seen == ["manifest.json"]


def test_replaced_shard_is_indexed_again(make_pairs, make_tar, make_pair):
    folder = make_pairs("pairs", [5, 3])
    before = index_shards(Storage(), folder)
    Path(folder, "00001.tar").write_bytes(make_tar({str(n): make_pair(n) for n in range(2)}))
    after = index_shards(Storage(), folder)
    assert [shard.samples for shard in after.shards] == [5, 2]
    assert after.shards[0] == before.shards[0]
    assert len(load_index(Storage(), folder, after.shards[1])) == 2


def test_truncated_shard_stops_indexing_by_name(make_pairs):
    folder = make_pairs("pairs", [5, 3, 4])
    os.truncate(f"{folder}/00001.tar", 4096)
    with pytest.raises(DataError, match=r"00001\.tar: the shard is truncated"):
        index_shards(Storage(), folder)
    assert not Path(folder, "manifest.json").exists()
    assert Path(folder, "00000.tar.index.npz").exists()


def test_indexing_a_pattern_keeps_other_shards(make_pairs):
    folder = make_pairs("pairs", [2, 3, 4])
    assert [shard.samples for shard in index_shards(Storage(), f"{folder}/0000{{0..1}}.tar").shards] == [2, 3]
    assert [shard.samples for shard in index_shards(Storage(), f"{folder}/00002.tar").shards] == [4]
    assert [shard.samples for shard in load_manifest(Storage(), folder).shards] == [2, 3, 4]


def test_ensure_indexed_adds_new_shards(make_pairs, make_tar, make_pair):
    folder = make_pairs("pairs", [5, 3])
    calls = []
    manifest = ensure_indexed(Storage(), folder, lambda *progress: calls.append(progress))
    assert manifest == load_manifest(Storage(), folder)
    assert [done for done, _, _ in calls] == [1, 2]
    Path(folder, "00002.tar").write_bytes(make_tar({"new": make_pair(9)}))
    watched = Watched()
    assert [shard.samples for shard in ensure_indexed(watched, folder).shards] == [5, 3, 1]
    assert [name for name in watched.seen if name.endswith(".tar")] == ["00002.tar"]
    assert [shard.samples for shard in ensure_indexed(Storage(), f"{folder}/00001.tar").shards] == [3]


def test_ensure_indexed_restores_a_lost_index(make_pairs):
    folder = make_pairs("pairs", [5, 3])
    manifest = index_shards(Storage(), folder)
    os.unlink(f"{folder}/00001.tar.index.npz")
    watched = Watched()
    assert ensure_indexed(watched, folder) == manifest
    assert [name for name in watched.seen if name.endswith(".tar")] == ["00001.tar"]
    assert len(load_index(Storage(), folder, manifest.shards[1])) == 3


def test_ensure_indexed_rejects_lost_and_truncated_shards(make_pairs):
    folder = make_pairs("pairs", [5, 3])
    index_shards(Storage(), folder)
    before = Path(folder, "manifest.json").read_bytes()
    os.truncate(f"{folder}/00001.tar", 4096)
    with pytest.raises(DataError, match=r"00001\.tar: the shard was truncated"):
        ensure_indexed(Storage(), folder)
    os.unlink(f"{folder}/00001.tar")
    with pytest.raises(DataError, match=r"00001\.tar: the shard is missing"):
        ensure_indexed(Storage(), folder)
    assert Path(folder, "manifest.json").read_bytes() == before


def test_manifest_of_version_1_is_indexed_again(make_pairs):
    folder = make_pairs("pairs", [5, 3])
    manifest = index_shards(Storage(), folder)
    path = Path(folder, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    with pytest.raises(DataError, match=r"version 1, expected 2"):
        load_manifest(Storage(), folder)
    assert ensure_indexed(Storage(), folder) == manifest
    assert load_manifest(Storage(), folder) == manifest


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run the block as an unprivileged user, because root can write to read-only folders."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_read_only_folder_is_named(make_tar, make_pair):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "0.tar").write_bytes(make_tar({"a": make_pair(0)}))
        os.chmod(folder, 0o555)
        try:
            with as_nobody(), pytest.raises(StorageError, match=r"denied.*give write access to the folder"):
                ensure_indexed(Storage(), folder)
            os.chmod(folder, 0o755)
            manifest = ensure_indexed(Storage(), folder)
            os.chmod(folder, 0o555)
            with as_nobody():
                assert ensure_indexed(Storage(), folder) == manifest
        finally:
            os.chmod(folder, 0o755)


def test_pipe_urls_are_rejected(tmp_path: Path):
    for call in (index_shards, ensure_indexed, load_manifest):
        with pytest.raises(ConfigError, match=r"runs a command"):
            call(Storage(), f"pipe:touch {tmp_path}/done; cat x.tar")
    assert os.listdir(tmp_path) == []


def energon_index(path: Path) -> bytes:
    """Return an index as Megatron-Energon's `prepare` writes it: the samples' offsets, then the end."""
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar if member.name.endswith(".jpg")]
        return struct.pack(f"<{len(offsets) + 1}Q", *offsets, tar.offset)


def dali_index(path: Path) -> bytes:
    """Return an index as DALI's wds2idx v1.2 writes it."""
    with tarfile.open(path) as tar:
        members = [f"{m.name.split('.')[1]} {m.offset_data} {m.size} {m.name}" for m in tar]
    return "\n".join(
        [f"v1.2 {len(members) // 2}", *(" ".join(members[i : i + 2]) for i in range(0, len(members), 2)), ""]
    ).encode()


@pytest.fixture
def counted(make_pairs) -> str:
    """Return four shards: three counted by different tools, one not counted."""
    folder = Path(make_pairs("counted", [5, 3, 4, 2]))
    (folder / "00000.tar.idx").write_bytes(energon_index(folder / "00000.tar"))
    (folder / "00001.idx").write_bytes(dali_index(folder / "00001.tar"))
    (folder / "00002_stats.json").write_text(json.dumps({"count": 6, "successes": 4, "failed_to_download": 2}))
    return str(folder)


def test_trusted_counts_avoid_reading(counted: str):
    watched = Watched()
    manifest = index_shards(watched, counted, trust_counts=True)
    assert [name for name in watched.seen if name.endswith(".tar")] == ["00003.tar"]
    assert [shard.samples for shard in manifest.shards] == [5, 3, 4, 2]
    assert [shard.is_trusted for shard in manifest.shards] == [True, True, True, False]
    assert load_manifest(Storage(), counted) == ensure_indexed(Storage(), counted) == manifest
    again = Watched()
    assert index_shards(again, counted, trust_counts=True) == manifest
    assert again.seen == ["manifest.json"]


def test_trusted_shard_is_indexed_on_first_use(counted: str):
    manifest = index_shards(Storage(), counted, trust_counts=True)
    watched = Watched()
    index = load_index(watched, counted, manifest.shards[1])
    assert index.keys == ("counted00005", "counted00006", "counted00007")
    again = load_index(watched, counted, manifest.shards[1])
    assert (again.keys, again.digest) == (index.keys, index.digest)
    assert watched.seen.count("00001.tar") == 1
    whole = index_shards(Storage(), counted)
    assert not any(shard.is_trusted for shard in whole.shards)
    assert whole.shards[1].digest == index.digest
    assert whole.digest != manifest.digest


def test_wrong_trusted_count_is_fatal_by_name(counted: str):
    Path(counted, "00002_stats.json").write_text(json.dumps({"successes": 3}))
    manifest = index_shards(Storage(), counted, trust_counts=True)
    assert [shard.samples for shard in manifest.shards] == [5, 3, 3, 2]
    with pytest.raises(DataError, match=r"00002\.tar: it has 4 samples, and the index of another tool said 3"):
        load_index(Storage(), counted, manifest.shards[2])


def test_replaced_trusted_shard_is_fatal_by_name(counted: str, make_tar, make_pair):
    manifest = index_shards(Storage(), counted, trust_counts=True)
    Path(counted, "00001.tar").write_bytes(make_tar({str(n): make_pair(n) for n in range(3)}))
    with pytest.raises(DataError, match=r"00001\.tar: the shard was changed"):
        load_index(Storage(), counted, manifest.shards[1])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("00000.tar.idx", b"12345", "not a list of 8-byte offsets"),
        ("00000.tar.idx", struct.pack("<3Q", 0, 100, 2048), "not increasing multiples of 512"),
        ("00000.tar.idx", struct.pack("<3Q", 0, 512, 1 << 30), "samples end at byte 1073741824"),
        ("00001.idx", b"v2.0 1\njpg 512 10\n", "version v2.0"),
        ("00001.idx", b"v1.1 2\njpg 512 10\n", "states 2 samples and lists 1"),
        ("00001.idx", b"v1.0 1\njpg 512\n", "line 2 is not a list of members"),
        ("00001.idx", b"v1.0 1\njpg 512 99999999\n", "a member of 99999999 bytes"),
        ("00002_stats.json", b'{"successes": 4000}', "4000 samples in a tar of"),
        ("00002_stats.json", b'{"count": 4}', "successes"),
    ],
)
def test_impossible_counts_are_rejected_by_name(counted: str, name: str, content: bytes, reason: str):
    Path(counted, name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: it does not fit .*{reason}"):
        index_shards(Storage(), counted, trust_counts=True)
    assert index_shards(Storage(), counted).num_samples == 14


def contents(index: ShardIndex, data: bytes) -> dict[str, dict[str, bytes]]:
    return {
        key: {name: data[at : at + size] for name, at, size in index.members(number)}
        for number, key in enumerate(index.keys)
    }


def test_tars_of_other_tools_are_indexed(shared: Path, tmp_path: Path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for path in (shared / "data" / "webdataset_tars").glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = index_shards(Storage(), str(folder))
    counts = {shard.name: shard.samples for shard in manifest.shards}
    assert counts == {
        "aistore_single-png-cls.tar": 1,
        "aistore_small-mnist-3.tar": 3,
        "clipretrieval_image1.tar": 4,
        "clipretrieval_image2.tar": 3,
        "clipretrieval_image3.tar": 2,
        "clipretrieval_image4.tar": 2,
        "webdataset_compressed.tar": 3,
        "webdataset_mpdata.tar": 100,
        "webdataset_tendata.tar": 100,
        "webdataset_testgz.tar": 1000,
    }
    for record in manifest.shards:
        data = (folder / record.name).read_bytes()
        found = contents(load_index(Storage(), str(folder), record), data)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
        assert {f"{key}.{name}": data for key, ms in found.items() for name, data in ms.items()} == files


def test_fuzzed_manifests_raise_data_errors_only(make_pairs):
    folder = make_pairs("some", [3, 2])
    index_shards(Storage(), folder)
    path = Path(folder, "manifest.json")
    whole = json.loads(path.read_text())
    rng = random.Random(3)
    values = [None, -1, 0, 1e400, 10**30, "", "x", "../x", "\ud83d", [], {}, True, "etag:x:1"]
    refused = 0
    for turn in range(fuzz_rounds(200)):
        if turn % 2:
            path.write_bytes(mutate(json.dumps(whole).encode(), rng))
        else:
            content = json.loads(json.dumps(whole))
            content["shards"][rng.randrange(2)][rng.choice(["name", "samples", "bytes", "digest", "etag"])] = (
                rng.choice(values)
            )
            with suppress(TypeError, KeyError):
                content["digest"] = Manifest(tuple(ShardRecord(**shard) for shard in content["shards"])).digest
            path.write_text(json.dumps(content))
        try:
            for shard in load_manifest(Storage(), folder).shards:
                load_index(Storage(), folder, shard)
        except DataError as error:
            refused += folder in str(error)
    assert refused
    path.write_bytes(b"[" * 50_000)
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest of shards"):
        load_manifest(Storage(), folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 50_000, b'{"successes": true}', b'{"successes": 1e400}', b"9" * 5000]
)
@pytest.mark.parametrize("name", ["0.tar.idx", "0.idx", "0_stats.json"])
def test_damaged_counts_of_other_tools_are_named(tmp_path: Path, make_tar, name: str, content: bytes):
    (tmp_path / "0.tar").write_bytes(make_tar({"a": {"txt": b"x"}}))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(name)):
        index_shards(Storage(), str(tmp_path), trust_counts=True)
