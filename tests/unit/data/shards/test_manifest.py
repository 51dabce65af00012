"""The manifest of a folder lists its shards exactly, and replaced, lost or truncated shards are detected."""

import gzip
import json
import os
import random
import shutil
import struct
import tarfile
import tempfile
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.config.errors import ConfigError, DataError, StorageError
from pipeline.data.shards import manifest as manifests
from pipeline.data.shards.check import check_shards
from pipeline.data.shards.index import ShardRecord
from pipeline.data.shards.manifest import Manifest, ensure_indexed, index_shards, load_index, load_manifest
from pipeline.data.storage import Storage
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.pairs import Watched, extracted, members_in, pair, tar_bytes, tar_of
from tests.support.shards_command import write_lines

STORAGE = Storage()
DAMAGED = (b"", b"\xff", b"[" * 50_000, b'{"successes": true}', b'{"successes": 1e400}', b"9" * 5000)  # counts


def sizes(manifest: Manifest) -> list[int]:
    return [shard.samples for shard in manifest.shards]


def pairs_tar(count: int) -> bytes:
    return tar_bytes({str(n): pair(n) for n in range(count)})


def watch(call: Any, *arguments: Any, **options: Any) -> tuple[Any, list[str]]:
    """Return a call's result, and the names of the tars that it read."""
    watched = Watched()
    return call(watched, *arguments, **options), watched.tars


@pytest.fixture
def folder(make_pairs) -> Path:
    """Return three shards of 5, 3 and 4 pairs, not indexed."""
    return Path(make_pairs("pairs", [5, 3, 4]))


def test_indexing_leaves_the_tars_unchanged_and_continues(folder: Path) -> None:
    url, before = str(folder), {path: path.read_bytes() for path in folder.iterdir()}
    manifest = ensure_indexed(STORAGE, url, progress := Mock())
    calls = [call.args for call in progress.mock_calls]
    assert [(done, total) for done, total, _ in calls] == [(1, 3), (2, 3), (3, 3)]
    names = [shard.name for shard in manifest.shards]
    assert names == ["00000.tar", "00001.tar", "00002.tar"] == sorted(name for *_, name in calls)
    assert (sizes(manifest), manifest.num_samples) == ([5, 3, 4], 12)
    assert {path: path.read_bytes() for path in before} == before
    assert [len(load_index(STORAGE, url, record)) for record in manifest.shards] == [5, 3, 4]
    for call in (index_shards, ensure_indexed, load_manifest):  # known shards are not read again
        watched = Watched()
        assert (call(watched, url), watched.names) == (manifest, ["manifest.json"])
    for name in ("manifest.json", "00002.tar.index.npz"):
        (folder / name).unlink()
    (folder / "00001.tar.index.npz").write_bytes(b"half an index")
    assert watch(index_shards, url) == (manifest, ["00001.tar", "00002.tar"])
    (folder / "00001.tar.index.npz").unlink()
    assert watch(ensure_indexed, url) == (manifest, ["00001.tar"])
    (folder / "00003.tar").write_bytes(pairs_tar(1))
    manifest, tars = watch(ensure_indexed, url)
    assert (sizes(manifest), tars) == ([5, 3, 4, 1], ["00003.tar"])
    assert sizes(ensure_indexed(STORAGE, f"{folder}/00001.tar")) == [3]
    path = folder / "manifest.json"
    write_lines(path, json.loads(path.read_text()) | {"version": 1})
    for call in (load_manifest, ensure_indexed):
        with pytest.raises(DataError, match=r"version 1, expected 2.*Make it again: mome shards index"):
            call(STORAGE, url)
    assert index_shards(STORAGE, url) == manifest == load_manifest(STORAGE, url)


def test_replaced_missing_and_truncated_shards_and_foreign_facts_are_found(folder: Path, tmp_path: Path, make_pairs):
    before = index_shards(STORAGE, str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    assert index_shards(STORAGE, str(tmp_path / "copy")).digest == before.digest  # of contents only
    (folder / "00001.tar").write_bytes(pairs_tar(2))
    after = index_shards(STORAGE, str(folder))
    assert (sizes(after), after.shards[0], after.digest == before.digest) == ([5, 2, 4], before.shards[0], False)
    assert len(load_index(STORAGE, str(folder), after.shards[1])) == 2
    shutil.copy(folder / "00000.tar.index.npz", folder / "00001.tar.index.npz")
    with pytest.raises(DataError, match=r"00001\.tar\.index\.npz: belongs to another version"):
        load_index(STORAGE, str(folder), after.shards[1])
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0]["samples"] = 4
    write_lines(folder / "manifest.json", content)
    with pytest.raises(DataError, match=r"edited or damaged"):
        load_manifest(STORAGE, str(folder))
    manifest, before = index_shards(STORAGE, str(folder)), (folder / "manifest.json").read_bytes()
    check_present = partial(manifests.check_present, manifest=manifest)
    check_present(STORAGE, str(folder))
    for damage, reason in (
        (lambda path: os.truncate(path, 4096), r"00001\.tar: the shard was truncated: 4096 bytes"),
        (os.unlink, r"00001\.tar: the shard is missing"),
    ):
        damage(folder / "00001.tar")
        for check in (check_present, ensure_indexed):
            with pytest.raises(DataError, match=reason):
                check(STORAGE, str(folder))
    assert (folder / "manifest.json").read_bytes() == before
    other = Path(make_pairs("other", [5, 3, 4]))  # indexing stops by name too, and keeps what it finished
    os.truncate(other / "00001.tar", 4096)
    with pytest.raises(DataError, match=r"00001\.tar: the shard is truncated"):
        index_shards(STORAGE, str(other))
    assert [(other / name).exists() for name in ("manifest.json", "00000.tar.index.npz")] == [False, True]


def test_brace_patterns_select_shards_and_pipes_are_rejected(folder: Path, tmp_path: Path) -> None:
    for call, names, expected in (
        (index_shards, "/0000{0..1}.tar", [5, 3]),
        (index_shards, "/00002.tar", [4]),  # the other shards stay in the manifest
        (load_manifest, "", [5, 3, 4]),
        (load_manifest, "/0000{1..2}.tar", [3, 4]),
    ):
        assert sizes(call(STORAGE, f"{folder}{names}")) == expected
    with pytest.raises(DataError, match=r"00003\.tar is not in"):
        load_manifest(STORAGE, f"{folder}/{{00000..00003}}.tar")
    expanded = manifests.shard_names("s3://bucket/a-{08..11}.{x,y}", {})
    assert expanded == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"]
    check = partial(check_shards, source_type="pairs", max_pixels=10**6, workers=1)
    for call in (index_shards, ensure_indexed, load_manifest, check):
        with pytest.raises(ConfigError, match=r"runs a command"):
            list(call(STORAGE, f"pipe:touch {tmp_path}/done; cat x.tar"))
    assert not (tmp_path / "done").exists()


def test_missing_parts_name_the_command_to_run(tmp_path: Path) -> None:
    url, empty = str(tmp_path), tar_of([])
    absent = "no such folder of shards.*mome shards build"
    for folder, reason in ((f"{url}/absent", absent), (url, r"no manifest\.json in it.*mome shards index")):
        with pytest.raises(DataError, match=reason):
            load_manifest(STORAGE, folder)
    for name, content, reason in (
        ("note.md", b"", r"no \.tar files there"),
        ("x.tgz", gzip.compress(empty), r"no \.tar files there\. Unpack x\.tgz"),
        ("y.tar", empty, r"x\.tgz would not be read along with y\.tar\. Unpack x\.tgz"),
        ("x.tar", empty, ""),
        ("z.TAR", empty, r"z\.TAR would not be read along with x\.tar\. Rename z\.TAR"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=reason) if reason else nullcontext():
            index_shards(STORAGE, url)
    index_shards(STORAGE, str(tmp_path / "{y}.tar"))
    (tmp_path / "z.TAR").unlink()
    (tmp_path / "lost.tar").symlink_to("absent.tar")
    with pytest.raises(DataError, match=r"lost\.tar: a link to a missing file"):
        index_shards(STORAGE, url)
    (tmp_path / "lost.tar").unlink()
    index_shards(STORAGE, url)
    for call in (load_manifest, ensure_indexed):
        with pytest.raises(DataError, match=r"have no samples"):
            call(STORAGE, url)


def test_read_only_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        Path(folder, "0.tar").write_bytes(pairs_tar(1))
        stack.callback(os.chmod, folder, 0o755)
        user = os.geteuid()
        for refused in (pytest.raises(StorageError, match=r"denied.*give write access"), nullcontext()):
            os.chmod(folder, 0o555)
            os.seteuid(user or 65534)  # root can write to read-only folders
            try:
                with refused:
                    ensure_indexed(STORAGE, folder)
            finally:
                os.seteuid(user)
            os.chmod(folder, 0o755)
            assert sizes(ensure_indexed(STORAGE, folder)) == [1]


@pytest.fixture
def counted(make_pairs) -> Path:
    """Return four shards: three counted by different tools, one not counted."""
    folder = Path(make_pairs("counted", [5, 3, 4, 2]))
    with tarfile.open(folder / "00000.tar") as tar:  # Megatron-Energon's `prepare`: the samples' offsets, then the end
        offsets = [member.offset for member in tar if member.name.endswith(".jpg")]
        (folder / "00000.tar.idx").write_bytes(struct.pack(f"<{len(offsets) + 1}Q", *offsets, tar.offset))
    with tarfile.open(folder / "00001.tar") as tar:  # DALI's wds2idx
        members = [f"{m.name.split('.')[1]} {m.offset_data} {m.size} {m.name}" for m in tar]
    pairs = map(" ".join, zip(members[::2], members[1::2], strict=True))
    write_lines(folder / "00001.idx", f"v1.2 {len(members) // 2}", *pairs)
    (folder / "00002_stats.json").write_text(json.dumps({"count": 6, "successes": 4, "failed_to_download": 2}))
    return folder


def test_trusted_shards_are_read_on_first_use_and_must_have_the_count(counted: Path) -> None:
    url = str(counted)
    manifest, tars = watch(index_shards, url, trust_counts=True)
    assert (sizes(manifest), tars) == ([5, 3, 4, 2], ["00003.tar"])
    assert [shard.is_trusted for shard in manifest.shards] == [True, True, True, False]
    assert load_manifest(STORAGE, url) == ensure_indexed(STORAGE, url) == manifest
    again, watched = Watched(), Watched()
    assert (index_shards(again, url, trust_counts=True), again.names) == (manifest, ["manifest.json"])
    one, other = (load_index(watched, url, manifest.shards[1]) for _ in range(2))
    assert one.keys == other.keys == ("counted00005", "counted00006", "counted00007")
    whole = index_shards(STORAGE, url)
    assert (watched.tars, any(shard.is_trusted for shard in whole.shards)) == (["00001.tar"], False)
    assert (sizes(whole), whole.digest == manifest.digest) == (sizes(manifest), False)
    assert whole.shards[1].digest == one.digest == other.digest
    for path in (*counted.glob("*.npz"), counted / "manifest.json"):
        path.unlink()
    (counted / "00002_stats.json").write_text(json.dumps({"successes": 3}))
    manifest = index_shards(STORAGE, url, trust_counts=True)
    assert sizes(manifest) == [5, 3, 3, 2]
    (counted / "00001.tar").write_bytes(pairs_tar(3))
    for shard, reason in ((1, "the shard was changed"), (2, "it has 4 samples, and the index of another tool said 3")):
        with pytest.raises(DataError, match=rf"0000{shard}\.tar: {reason}"):
            load_index(STORAGE, url, manifest.shards[shard])


def test_impossible_counts_are_rejected_by_name(counted: Path) -> None:
    energon, dali, stats = "00000.tar.idx", "00001.idx", "00002_stats.json"
    for name, content, reason in (
        (energon, b"12345", "not a list of 8-byte offsets"),
        (energon, struct.pack("<3Q", 0, 100, 2048), "not increasing multiples of 512"),
        (energon, struct.pack("<3Q", 0, 512, 1 << 30), "samples end at byte 1073741824"),
        (dali, b"v2.0 1\njpg 512 10\n", "version v2.0"),
        (dali, b"v1.1 2\njpg 512 10\n", "states 2 samples and lists 1"),
        (dali, b"v1.0 1\njpg 512\n", "line 2 is not a list of members"),
        (dali, b"v1.0 1\njpg 513 10\n", "line 2: no member has 10 bytes at byte 513"),
        (dali, b"v1.0 1\njpg 512 99999999\n", "samples end at byte 100000511"),
        (stats, b'{"successes": 4000}', "4000 samples end at byte"), (stats, b'{"count": 4}', "successes"),
        (stats, b'{"successes": -1}', "-1 is not a number of samples"),
        *((name, damaged, "") for damaged in DAMAGED for name in (energon, dali, stats)),
    ):  # fmt: skip
        whole = (counted / name).read_bytes()
        (counted / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: it does not fit .*{reason}"):
            index_shards(STORAGE, f"{counted}/{name[:5]}.tar", trust_counts=True)
        (counted / name).write_bytes(whole)


def test_tars_of_other_tools_are_indexed(shared: Path, tmp_path: Path) -> None:
    for path in (shared / "data" / "webdataset_tars").glob("*.tar"):
        shutil.copy(path, tmp_path)
    manifest = index_shards(STORAGE, str(tmp_path))
    assert {shard.name.removesuffix(".tar"): shard.samples for shard in manifest.shards} == {
        "aistore_single-png-cls": 1, "aistore_small-mnist-3": 3, "clipretrieval_image1": 4, "clipretrieval_image2": 3,
        "clipretrieval_image3": 2, "clipretrieval_image4": 2, "webdataset_compressed": 3, "webdataset_mpdata": 100,
        "webdataset_tendata": 100, "webdataset_testgz": 1000,
    }  # fmt: skip
    for record in manifest.shards:
        data = (tmp_path / record.name).read_bytes()
        assert members_in(data, load_index(STORAGE, str(tmp_path), record)) == extracted(data)


def test_fuzzed_manifests_raise_data_errors_only(folder: Path) -> None:
    index_shards(STORAGE, str(folder))
    path, rng, refused = folder / "manifest.json", random.Random(3), 0
    whole = path.read_text()
    values = [None, -1, 0, 1e400, 10**30, "", "x", "../x", "\ud83d", [], {}, True, "etag:x:1"]
    for turn in range(fuzz_rounds(200)):
        if turn % 2:
            path.write_bytes(mutate(whole.encode(), rng))
        else:
            content = json.loads(whole)
            fields = content["shards"][rng.randrange(2)]
            fields[rng.choice(["name", "samples", "bytes", "digest", "etag"])] = rng.choice(values)
            with suppress(TypeError, KeyError):
                content["digest"] = Manifest(tuple(ShardRecord(**shard) for shard in content["shards"])).digest
            path.write_text(json.dumps(content))
        try:
            for shard in load_manifest(STORAGE, str(folder)).shards:
                load_index(STORAGE, str(folder), shard)
        except DataError as error:
            refused += str(folder) in str(error)
    assert refused
    path.write_bytes(b"[" * 50_000)
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest of shards"):
        load_manifest(STORAGE, str(folder))
