"""Batches are independent of ranks, threads and processes, complete per epoch, and free of bad samples."""

import gc
import hashlib
import io
import json
import os
import threading
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import fields
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from pipeline.config.errors import ConfigError, DataError, RunFailed
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import FIELDS, Batch
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples import builder as module
from pipeline.data.loading import backends
from pipeline.data.reading.cache import FOLDER
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support import data_stream
from tests.support.data_stream import copy_shards, data_config, hash_of, open_loader, take, with_loader

KINDS = {"images": ("mim",), "text": ("mlm",), "pairs": ("itc", "itm", "mlm", "mim")}
STEPS = 12  # of loader processes


@pytest.fixture
def folders(indexed_pairs) -> dict[str, str]:
    """Return two sources of 23 and 14 pairs."""
    return {"one": indexed_pairs("one", [9, 4, 10]), "two": indexed_pairs("two", [6, 8])}


def run_config(folders: dict[str, str], kind: str = "pairs", **changes) -> RunConfig:
    return data_config(folders, KINDS[kind], kind, **changes)


def digest_of(config: RunConfig, tokenizer: Tokenizer | None = None) -> str:
    with open_loader(config, tokenizer) as loader:
        return loader.digest


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_depend_on_world_size_or_threads(folders, kind: str):
    config, readers = run_config(folders, kind), ((1, 1), (1, 4), (2, 1), (3, 4), (5, 1))
    assert len({hash_of(config, range(2, 8), world, threads_per_worker=threads) for world, threads in readers}) == 1


def test_ranks_and_restarts_read_parts_of_the_uninterrupted_run(folders):
    config, whole = run_config(folders), hashlib.sha256()
    uninterrupted = take(config, 9)
    for start in (1, 5, 8):
        for batch, expected in zip(take(config, 9 - start, start), uninterrupted[start:], strict=True):
            for field in fields(Batch):
                one, other = getattr(batch, field.name), getattr(expected, field.name)
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
    uninterrupted[4].hash_into(whole)
    for world in (2, 3, 5):
        parts, digest = [take(config, 1, 4, rank=rank, world_size=world)[0] for rank in range(world)], hashlib.sha256()
        assert [place for part in parts for place in part.place.tolist()] == list(range(10))
        for part in parts:
            part.hash_into(digest)
        assert digest.digest() == whole.digest()
    with open_loader(config) as loader:
        next(loader.batches(10 * sum(loader.order.parts)))  # 10 cycles of the mixing were read before
        counts, mixed = loader.counts(), dict(zip(loader.order.names, loader.order.parts, strict=True))
    for name, size in (("one", 23), ("two", 14)):
        assert counts[f"epochs/{name}"] == pytest.approx((100 * mixed[name] + counts[f"samples/{name}"]) / size)


def test_batch_contains_what_the_objectives_read_padded_to_the_longest_row(folders, tmp_path: Path, make_tar):
    vision, text = {"image", "patch_positions"}, {"text", "text_keep"}
    masked = {"masked_text", "mask_positions", "mask_labels"}
    for kind, objectives, names in [
        ("images", ("mim",), vision), ("text", ("mlm",), text | masked), ("pairs", ("itc",), {"image"} | text),
        ("pairs", KINDS["pairs"], vision | text | masked),
    ]:  # fmt: skip
        (batch,) = take(data_config(folders, objectives, kind))
        assert {name for name, field in FIELDS.items() if field.group and getattr(batch, name) is not None} == names
    (tmp_path / "0.tar").write_bytes(make_tar({str(n): {"txt": f"thing {n}".encode()} for n in range(12)}))
    index_shards(Storage(), str(tmp_path))
    (batch,) = take(run_config({"one": str(tmp_path)}, "text"))
    assert batch.image is None
    assert "thing" in (tokenizer := data_stream.caption_tokenizer()).decode(batch.text[0].tolist())
    (batch,) = take(run_config(folders))
    assert (batch.image.shape, batch.image.dtype) == ((10, 16, 16, 3), torch.uint8)
    assert batch.patch_positions.shape == (10, 6)  # 0.4 of 16 patches
    assert batch.text.shape == batch.text_keep.shape == batch.masked_text.shape
    assert batch.text.shape[1] <= 12
    assert batch.text_keep.any(dim=0).all()
    assert (batch.text[~batch.text_keep] == tokenizer.pad_id).all()
    assert (batch.text[:, 0] == tokenizer.cls_id).all()
    is_masked = batch.mask_labels != -100
    assert all(is_masked.any(dim=axis).all() for axis in (0, 1))
    labels = batch.text.gather(1, batch.mask_positions)
    assert torch.equal(labels[is_masked], batch.mask_labels[is_masked])
    untouched = torch.ones_like(batch.text_keep).scatter(1, batch.mask_positions.where(is_masked, 0), False)
    untouched[:, 0] = True
    assert torch.equal(batch.text[untouched], batch.masked_text[untouched])
    (after,) = take(run_config(folders, stage={"image_size": 24}))  # which overrides the model's
    assert after.image.shape[1:] == (24, 24, 3)
    assert torch.equal(batch.uid, after.uid)
    assert torch.equal(batch.masked_text, after.masked_text)


def test_augmentation_differs_between_epochs_and_image_ids_identify_equal_images(folders, indexed_pairs, make_pair):
    seen = defaultdict[int, list[tuple[bytes, ...]]](list)
    for batch in take(run_config({"one": folders["one"]}, stage={"global_batch_size": 5}), 23):
        for row, uid in enumerate(batch.uid.tolist()):
            parts = batch.image[row], batch.text[row][batch.text_keep[row]], batch.patch_positions[row]
            seen[uid].append(tuple(part.numpy().tobytes() for part in parts))
    assert [len(epochs) for epochs in seen.values()] == [5] * 23
    for part in range(3):
        assert sum(len({epoch[part] for epoch in epochs}) > 1 for epochs in seen.values()) > 20
    named = {"json": b'{"captions": ["a thing"], "image_id": 9}'}
    planted = {(0, 1): make_pair(0), (0, 2): make_pair(5) | named, (0, 3): make_pair(6) | named}
    folder = indexed_pairs("equal", [10], planted)
    with open_loader(run_config({"one": folder})) as loader:
        numbers = next(loader.batches(0)).image_id.tolist()
        ids = dict(zip([sample.sample for sample in loader.order.samples(0)], numbers, strict=True))
    assert (ids[0], ids[2], len(set(ids.values()))) == (ids[1], ids[3], 8)
    (texts,) = take(run_config({"one": folder}, "text"))
    assert torch.equal(texts.image_id, texts.uid)


@pytest.fixture
def spoiled(indexed_pairs, make_pair) -> tuple[str, dict[tuple[int, int], str]]:
    """Return a source of 23 pairs, and the failing stage of the five that are bad in different ways."""
    big, good = io.BytesIO(), make_pair(99)
    Image.new("RGB", (400, 400)).save(big, "PNG")
    planted = {
        (0, 3): ("image", good | {"jpg": good["jpg"][: len(good["jpg"]) // 2]}),
        (1, 2): ("caption", good | {"json": json.dumps({"captions": ["fine", " "]}).encode()}),
        (2, 0): ("members", {"json": good["json"]}), (2, 7): ("members", {"jpg": good["jpg"]}),
        (2, 9): ("image", {"png": big.getvalue(), "json": good["json"]}),
    }  # fmt: skip
    folder = indexed_pairs("spoiled", [9, 4, 10], {place: members for place, (_, members) in planted.items()})
    return folder, {place: stage for place, (stage, _) in planted.items()}


@pytest.mark.parametrize("world", [1, 3])
def test_bad_samples_are_counted_at_every_world_size(spoiled, world: int):
    folder, faults = spoiled
    config = run_config({"one": folder}, data={"max_pixels": 10_000})
    records, counts, planned = [], Counter(), set()
    for rank in range(world):
        with open_loader(config, rank=rank, world_size=world) as loader:
            list(islice(loader.batches(0), 23))  # 230 examples: ten epochs of 23
            records += loader.quarantined()
            counts.update(loader.counts())
            assert loader.quarantined() == []
            order = [(step, place, s) for step in range(23) for place, s in enumerate(loader.order.samples(step))]
            planned |= {(step, place) for step, place, s in order if (s.shard, s.sample) in faults}
    assert counts == {"bad/one": 50, "samples/one": 230, "epochs/one": pytest.approx(10)}
    first = [0, 9, 13]
    expected = {(f"0000{s}.tar", f"spoiled{first[s] + n:05d}", stage) for (s, n), stage in faults.items()}
    read = Counter((record["shard"], record["key"], record["stage"]) for record in records)
    assert read == dict.fromkeys(expected, 10)
    assert {record["replaced_by"] for record in records}.isdisjoint(key for _, key, _ in expected)
    assert {(record["step"], record["place"]) for record in records} == planned
    assert hash_of(config, range(5), world, threads_per_worker=3) == hash_of(config, range(5), 1, threads_per_worker=1)


def test_too_many_bad_samples_stop_the_run(spoiled, indexed_pairs):
    with open_loader(run_config({"one": spoiled[0]}, data={"max_pixels": 10_000, "max_bad_rate": 0.1})) as loader:
        list(islice(batches := loader.batches(0), 9))
        with pytest.raises(DataError, match=r"source 'one': .* bad .*max_bad_rate"):
            next(batches)  # the hundredth sample is in the tenth batch
    folder = indexed_pairs("bad", [12], {(0, n): {"jpg": b"\xff\xd8 no image", "txt": b"thing"} for n in range(12)})
    with pytest.raises(DataError, match=r"source 'one': .* is bad .*and so were 16 candidates"):
        take(run_config({"one": folder}))


def test_data_changes_the_digest_and_loader_settings_do_not(folders, make_tar, make_pair):
    base = digest_of(run_config(folders))
    assert digest_of(run_config(folders, data={"loader": {"threads_per_worker": 7, "prefetch_batches": 5}})) == base
    changes = [
        {"data": {"augment": {"magnitude": 3}}}, {"data": {"max_pixels": 1000}}, {"seed": 4},
        {"stage": {"masking": {"mlm_probability": 0.3}}}, {"stage": {"max_text_length": 9}},
        {"stage": {"name": "other"}}, {"stage": {"image_size": 24}},
    ]  # fmt: skip
    digests = [base, *(digest_of(run_config(folders, **change)) for change in changes)]
    digests.append(digest_of(run_config(folders), Tokenizer.train(["other words"], 100)))
    Path(folders["one"], "00001.tar").write_bytes(make_tar({str(n): make_pair(n + 40) for n in range(4)}))
    index_shards(Storage(), folders["one"])
    digests.append(digest_of(run_config(folders)))
    assert len(set(digests)) == len(digests)


def test_errors_are_raised_in_their_own_step_and_close_ends_every_thread(folders, monkeypatch: pytest.MonkeyPatch):
    config = run_config(folders, data={"loader": {"threads_per_worker": 3, "prefetch_batches": 4}})
    build = module.ExampleBuilder.build

    def failing(builder: module.ExampleBuilder, step: int, *rest):
        if step == 3:
            raise DataError("the store is gone")
        return build(builder, step, *rest)

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]

    with open_loader(config) as loader:
        next(batches := loader.batches(0))
        assert threads()
        assert 0 < loader.wait_seconds < 30
    assert (threads(), list(batches)) == ([], [])
    monkeypatch.setattr(module.ExampleBuilder, "build", failing)
    batches = open_loader(config).thing.batches(0)
    assert [batch.step for batch in islice(batches, 3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"the store is gone"):
        next(batches)
    assert not threads()


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_missing_data_and_a_small_cache_are_rejected_at_the_start(s3, folders, tmp_path: Path):
    sizes = sum(file.stat().st_size for file in Path(folders["one"]).glob("*.tar"))
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": sizes - 1}
    remote = {"folders": {"one": copy_shards(folders["one"], s3)}, "storage": s3.config.model_dump()}
    with pytest.raises(ConfigError, match=rf"max_bytes {sizes - 1} is below the {sizes} bytes of the open windows"):
        open_loader(run_config(**remote, data={"cache": cache}))
    assert len(take(run_config(**remote, data={"cache": cache | {"max_bytes": sizes}}))[0]) == 10
    assert os.listdir(tmp_path / "cache") == [FOLDER]
    Path(folders["two"], "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar: the shard is missing"):
        open_loader(run_config(folders))


def test_images_are_not_flipped_if_a_caption_names_a_side(indexed_pairs, make_pair, monkeypatch: pytest.MonkeyPatch):
    augment, allowed = module.augment, set[bool]()
    monkeypatch.setattr(module, "augment", lambda *args: allowed.add(args[4]) or augment(*args))
    for name, caption, may_flip in (("sides", "a thing at left", False), ("plain", "a thing", True)):
        described = {"json": json.dumps({"captions": [caption]}).encode()}
        folder = indexed_pairs(name, [10], {(0, n): make_pair(n) | described for n in range(10)})
        allowed.clear()
        take(run_config({name: folder}))
        assert allowed == {may_flip}


def test_buckets_group_captions_of_similar_length_and_filters_are_respected(indexed_pairs, make_pair, tmp_path: Path):
    planted = {}
    for number in range(40):  # captions of 1 to 20 words; odd ones score 0.1, the others 0.9
        caption = " ".join(["thing"] * (1 + number * 7 % 20))
        described = {"captions": [caption], "score": 0.1 if number % 2 else 0.9}
        planted[divmod(number, 20)] = make_pair(number) | {"json": json.dumps(described).encode()}
    folder = indexed_pairs("wordy", [20, 20], planted)

    def wordy(stage: dict, source: dict, **changes) -> RunConfig:
        stage = {"max_text_length": 30, "global_batch_size": 5, **stage}
        config = run_config({"wordy": folder}, stage=stage, data={"shuffle_window": 4}, **changes)
        values = config.model_dump(mode="json", exclude_unset=True)
        values["sources"]["wordy"] |= source
        return validate(values, "test")

    plain, bucketed = wordy({}, {}), wordy({"buckets": {"by": "caption", "batches": 8}}, {})
    readers = ((1, 0), (3, 0), (1, 2))
    assert len({hash_of(bucketed, range(9), world, num_workers=workers) for world, workers in readers}) == 1
    epochs = [take(config, 8) for config in (plain, bucketed)]
    padding = [sum(int((~batch.text_keep).sum()) for batch in epoch) for epoch in epochs]
    assert padding[1] < padding[0] / 2
    uids = [sorted(uid for batch in epoch for uid in batch.uid.tolist()) for epoch in epochs]
    assert uids[0] == uids[1], "a block of one epoch holds the same samples in another order"
    (tmp_path / "opt_out.txt").write_text("wordy00004\nwordy00020\n")
    source = {"filters": {"score": {"min": 0.5}}, "opt_out": str(tmp_path / "opt_out.txt")}
    config = wordy({}, source, output=str(tmp_path / "runs"))
    chosen = Counter(uid for batch in take(config, 18) for uid in batch.uid.tolist())
    assert [*chosen.values()] == [5] * 18, "18 batches of 5 are five epochs of 18 samples"
    assert chosen.keys() < set(uids[0])
    assert digest_of(config) != digest_of(plain)


def process_config(folder: str) -> RunConfig:
    """Return the config of pairs that two processes load."""
    data = {"streams": 4, "loader": {"num_workers": 2, "threads_per_worker": 2}}
    return data_config({"pairs": folder}, data=data, stage={"steps": STEPS, "global_batch_size": 8})


@pytest.fixture
def processes(indexed_pairs) -> RunConfig:
    return process_config(indexed_pairs("pairs", [11, 13]))


def children() -> list[psutil.Process]:
    """Return the live loader processes of this process, by id."""
    loaders = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it ended just now
            loaders += [child] if any("data.loading.backends" in word for word in child.cmdline()) else []
    return sorted(loaders, key=lambda child: child.pid)


def test_batch_memory_is_reused_after_its_last_reference_and_closing_leaves_nothing(processes):
    before = len(os.listdir("/proc/self/fd"))
    with open_loader(processes) as loader:
        first = next(stream := loader.batches(0))
        assert len(children()) == 2
        free = loader._open[0]._free
        pixels, num_free = first.image.clone(), len(free)
        for _ in range(2 * STEPS):
            next(stream)
        assert torch.equal(first.image, pixels), "a slot was filled again while its batch was in use"
        kept = first.image[3]
        del first
        gc.collect()
        assert torch.equal(kept, pixels[3])
        del kept
        gc.collect()
        assert len(free) == num_free + 1
    del loader, stream, free
    gc.collect()
    assert children() == []
    assert len(os.listdir("/proc/self/fd")) == before
    kept, expected = take(processes, STEPS), take(with_loader(processes, num_workers=0), STEPS)
    for batch, other in zip(kept, expected, strict=True):  # kept beyond their loader
        assert torch.equal(batch.image, other.image)
        assert torch.equal(batch.masked_text, other.masked_text)


def test_killed_process_is_restarted_without_effect_on_data_until_it_dies_repeatedly(processes, monkeypatch):
    uninterrupted = take(with_loader(processes, num_workers=0), STEPS)
    with open_loader(processes) as loader:
        batches = loader.batches(0)
        for step, expected in enumerate(uninterrupted):
            assert torch.equal(next(batches).image, expected.image)
            if step in (2, 6):
                children()[step % 3 // 2].kill()
        assert len(children()) == 2
    monkeypatch.setattr(backends, "MAX_RESTARTS", 1)
    message = r"died 2 times in a short while, the last time by SIGKILL.*memory"
    with open_loader(processes) as loader, pytest.raises(RunFailed, match=message):  # noqa: PT012
        for _ in loader.batches(0):
            for child in children():
                child.kill()
    assert children() == []


def test_errors_keep_their_type_and_bad_samples_are_reported_across_processes(processes, indexed_pairs, make_pair):
    for shard in Path(processes.sources["pairs"].shards).glob("*.tar"):
        spoiled, times = bytearray(shard.read_bytes()), shard.stat()
        spoiled[512:-1024:64] = bytes(byte ^ 1 for byte in spoiled[512:-1024:64])
        shard.write_bytes(spoiled)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with open_loader(processes) as loader, pytest.raises(DataError, match=r"the shard was changed"):
        next(loader.batches(0))
    assert children() == []
    planted = {(0, n): make_pair(n) | {"jpg": b"\xff\xd8 no image"} for n in (2, 9, 17)}
    with open_loader(process_config(indexed_pairs("spoiled", [24], planted))) as loader:
        list(islice(loader.batches(0), 3))
        assert loader.counts()["bad/pairs"] == 3
        keys = sorted(record["key"] for record in loader.quarantined())
    assert keys == ["spoiled00002", "spoiled00009", "spoiled00017"]
