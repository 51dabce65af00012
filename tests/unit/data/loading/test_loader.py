"""The loader's batches are independent of ranks and threads, complete per epoch, and free of bad samples."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from dataclasses import fields
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples import builder as module
from pipeline.data.loading.loader import Loader, fingerprint
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.objectives import batch_groups

OBJECTIVES = {
    "vision": ("images", {"mim": {}}),
    "language": ("text", {"mlm": {}}),
    "vision_language": ("pairs", {"itc": {}, "itm": {}, "mlm": {}, "mim": {}}),
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    captions = [f"picture {number} shows a thing in way {way}" for number in range(60) for way in "abc"]
    return Tokenizer.train(captions, 200)


@pytest.fixture
def folders(make_pairs) -> dict[str, str]:
    """Return two sources of 23 and 14 pairs."""
    found = {"one": make_pairs("one", [9, 4, 10]), "two": make_pairs("two", [6, 8])}
    for folder in found.values():
        index_shards(Storage(), folder)
    return found


def run_config(folders: dict[str, str], kind: str = "vision_language", **changes) -> RunConfig:
    source_type, objectives = OBJECTIVES[kind]
    data = {"streams": 5, "shuffle_window": 2, "max_bad_rate": 1.0} | changes.pop("data", {})
    stage = {
        "name": kind,
        "sources": dict(zip(folders, (1.0, 1.7), strict=False)),
        "objectives": objectives,
        "steps": 100,
        "global_batch_size": 10,
        "max_text_length": 12,
    } | changes.pop("stage", {})
    values = {
        "name": "test",
        "seed": 3,
        "model": {"width": 32, "layers": 3, "heads": 2, "vision_language_layers": 1, "image_size": 16, "patch_size": 4},
        "sources": {name: {"shards": folder, "type": source_type} for name, folder in folders.items()},
        "data": data,
        "stages": [stage],
    } | changes
    return validate(values, "test")


def with_loader(config: RunConfig, **changes: int) -> RunConfig:
    loader = config.data.loader.model_copy(update=changes)
    return config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})


def make(config: RunConfig, tokenizer: Tokenizer, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(
        config,
        config.stages[0],
        batch_groups(config, config.stages[0]),
        Storage(config.storage),
        tokenizer,
        rank=rank,
        world_size=world_size,
    )


def take(config: RunConfig, tokenizer: Tokenizer, start: int, count: int, rank: int = 0, world: int = 1) -> list[Batch]:
    with make(config, tokenizer, rank, world) as loader:
        return list(islice(loader.batches(start), count))


def assert_equal(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


def row_hashes(batches: list[Batch]) -> list[str]:
    found = []
    for batch in batches:
        for row in range(len(batch)):
            digest = hashlib.sha256()
            batch.rows(slice(row, row + 1)).hash_into(digest)
            found.append(digest.hexdigest())
    return found


@pytest.mark.parametrize("kind", list(OBJECTIVES))
def test_batches_do_not_depend_on_world_size_or_threads(folders, tokenizer, kind: str):
    config = run_config(folders, kind)
    stage = config.stages[0]
    prints = {
        fingerprint(
            with_loader(config, threads_per_worker=threads),
            stage,
            batch_groups(with_loader(config, threads_per_worker=threads), stage),
            Storage(),
            tokenizer,
            range(2, 8),
            world_size,
        )
        for world_size in (1, 2, 3, 5)
        for threads in (1, 4)
    }
    assert len(prints) == 1


def test_ranks_read_slices_of_the_global_batch(folders, tokenizer):
    config = run_config(folders)
    whole = row_hashes(take(config, tokenizer, 4, 1))
    for world in (2, 3, 5):
        shares = [take(config, tokenizer, 4, 1, rank, world) for rank in range(world)]
        assert [place for share in shares for place in share[0].place.tolist()] == list(range(10))
        assert [row for share in shares for row in row_hashes(share)] == whole


def test_restart_at_a_step_equals_the_uninterrupted_run(folders, tokenizer):
    config = run_config(folders)
    uninterrupted = take(config, tokenizer, 0, 9)
    for start in (1, 5, 8):
        for batch, expected in zip(take(config, tokenizer, start, 9 - start), uninterrupted[start:], strict=True):
            assert_equal(batch, expected)


def test_every_sample_is_read_once_per_epoch(folders, tokenizer):
    config = run_config({"one": folders["one"]})
    with make(config, tokenizer) as loader:
        order = [(slot.epoch, uid) for batch in islice(loader.batches(0), 23) for slot, uid in rows_of(loader, batch)]
    assert Counter(order).most_common(1)[0][1] == 1
    epochs = Counter(epoch for epoch, _ in order)
    assert epochs == dict.fromkeys(range(10), 23)
    assert len({uid for _, uid in order}) == 23


def rows_of(loader: Loader, batch: Batch):
    return zip(loader.order.batch(batch.step), batch.uid.tolist(), strict=True)


def test_batch_contains_what_the_objectives_read(folders, tokenizer):
    members = {
        "vision": {"image", "patch_positions"},
        "language": {"text", "text_keep", "masked_text", "mask_positions", "mask_labels"},
    }
    members["vision_language"] = members["vision"] | members["language"]
    for kind, expected in members.items():
        batch = take(run_config(folders, kind), tokenizer, 0, 1)[0]
        optional = {f.name for f in fields(Batch)} - {"step", "place", "uid", "image_id", "source"}
        assert {name for name in optional if getattr(batch, name) is not None} == expected
    only_contrast = run_config(folders, stage={"objectives": {"itc": {}}})
    batch = take(only_contrast, tokenizer, 0, 1)[0]
    assert batch.masked_text is None
    assert batch.patch_positions is None
    assert batch.image is not None


def test_shapes_types_and_padding(folders, tokenizer):
    batch = take(run_config(folders), tokenizer, 0, 1)[0]
    assert batch.image.shape == (10, 16, 16, 3)
    assert batch.image.dtype == torch.uint8
    assert batch.patch_positions.shape == (10, 6)  # 0.4 of 16 patches
    assert batch.text.shape == batch.text_keep.shape == batch.masked_text.shape
    assert batch.text.shape[1] <= 12
    assert batch.text_keep.any(dim=0).all(), "padded to the longest row and no further"
    assert (batch.text[~batch.text_keep] == tokenizer.pad_id).all()
    assert (batch.text[:, 0] == tokenizer.cls_id).all()
    is_masked = batch.mask_labels != -100
    assert is_masked.any(dim=1).all()
    assert is_masked.any(dim=0).all()
    labels = batch.text.gather(1, batch.mask_positions)
    assert torch.equal(labels[is_masked], batch.mask_labels[is_masked])
    untouched = torch.ones_like(batch.text_keep).scatter(1, batch.mask_positions.where(is_masked, 0), False)
    untouched[:, 0] = True
    assert torch.equal(batch.text[untouched], batch.masked_text[untouched])


def test_augmentation_differs_between_epochs(folders, tokenizer):
    config = run_config({"one": folders["one"]}, stage={"global_batch_size": 5})
    seen: dict[int, list[tuple[bytes, bytes, bytes]]] = {}
    for batch in take(config, tokenizer, 0, 23):
        for row in range(len(batch)):
            look = batch.image[row], batch.text[row][batch.text_keep[row]], batch.patch_positions[row]
            seen.setdefault(int(batch.uid[row]), []).append(tuple(part.numpy().tobytes() for part in look))
    assert len(seen) == 23
    assert all(len(looks) == 5 for looks in seen.values())
    for part in range(3):
        assert sum(len({look[part] for look in looks}) > 1 for looks in seen.values()) > 20


def test_image_id_identifies_equal_images(make_pairs, make_pair, tokenizer):
    planted = {(0, 1): make_pair(0), (0, 2): make_pair(5) | {"json": b'{"captions": ["a thing"], "image_id": 9}'}}
    planted[(0, 3)] = make_pair(6) | {"json": b'{"captions": ["a thing"], "image_id": 9}'}
    folder = make_pairs("equal", [10], planted)
    index_shards(Storage(), folder)
    config = run_config({"one": folder})
    with make(config, tokenizer) as loader:
        batch = next(loader.batches(0))
        ids = {
            slot.sample: image_id for slot, image_id in zip(loader.order.batch(0), batch.image_id.tolist(), strict=True)
        }
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]
    assert len(set(ids.values())) == 8
    texts = take(run_config({"one": folder}, "language"), tokenizer, 0, 1)[0]
    assert torch.equal(texts.image_id, texts.uid)


def test_plain_text_shards_are_read(tmp_path: Path, make_tar, tokenizer):
    (tmp_path / "0.tar").write_bytes(make_tar({str(n): {"txt": f"thing {n}".encode()} for n in range(12)}))
    index_shards(Storage(), str(tmp_path))
    batch = take(run_config({"one": str(tmp_path)}, "language"), tokenizer, 0, 1)[0]
    assert batch.image is None
    assert "thing" in tokenizer.decode(batch.text[0].tolist())


PLANTED = {
    (0, 3): ("corrupt", "image"),
    (1, 2): ("empty caption", "caption"),
    (2, 0): ("no picture", "members"),
    (2, 7): ("no caption", "members"),
    (2, 9): ("bomb", "image"),
}


@pytest.fixture
def spoiled(make_pairs, make_pair) -> str:
    """Return a source of 23 pairs, five of them bad in different ways."""
    from io import BytesIO

    from PIL import Image

    big = BytesIO()
    Image.new("RGB", (400, 400)).save(big, "PNG")
    good = make_pair(99)
    planted = {
        (0, 3): good | {"jpg": good["jpg"][: len(good["jpg"]) // 2]},
        (1, 2): good | {"json": json.dumps({"captions": ["fine", " "]}).encode()},
        (2, 0): {"json": good["json"]},
        (2, 7): {"jpg": good["jpg"]},
        (2, 9): {"png": big.getvalue(), "json": good["json"]},
    }
    folder = make_pairs("spoiled", [9, 4, 10], planted)
    index_shards(Storage(), folder)
    return folder


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_bad_samples_are_counted_at_every_world_size(spoiled, tokenizer, world: int):
    config = run_config({"one": spoiled}, data={"max_pixels": 10_000})
    records, counts = [], Counter()
    for rank in range(world):
        with make(config, tokenizer, rank, world) as loader:
            list(islice(loader.batches(0), 23))  # 230 examples: ten epochs of 23
            records += loader.quarantined()
            counts.update(loader.counts())
            assert loader.quarantined() == []
    assert counts["bad/one"] == 50
    assert counts["samples/one"] == 230
    assert counts["epochs/one"] == pytest.approx(10)
    by_key = Counter((record["shard"], record["key"], record["stage"]) for record in records)
    first = [0, 9, 13]
    expected = {(f"0000{s}.tar", f"spoiled{first[s] + n:05d}", stage) for (s, n), (_, stage) in PLANTED.items()}
    assert set(by_key) == expected
    assert set(by_key.values()) == {10}
    assert all(record["replaced_by"] not in {key for _, key, _ in expected} for record in records)
    assert {(record["step"], record["place"]) for record in records} == planned_bad(config, tokenizer)


def planned_bad(config: RunConfig, tokenizer: Tokenizer) -> set[tuple[int, int]]:
    with make(config, tokenizer) as loader:
        slots = [(step, place, s) for step in range(23) for place, s in enumerate(loader.order.batch(step))]
    return {(step, place) for step, place, slot in slots if (slot.shard, slot.sample) in PLANTED}


def test_replacements_are_the_same_for_every_world_size(spoiled, tokenizer):
    config = run_config({"one": spoiled}, data={"max_pixels": 10_000})
    prints = {
        fingerprint(
            with_loader(config, threads_per_worker=t),
            config.stages[0],
            batch_groups(with_loader(config, threads_per_worker=t), config.stages[0]),
            Storage(),
            tokenizer,
            range(5),
            w,
        )
        for w in (1, 2, 3)
        for t in (1, 3)
    }
    assert len(prints) == 1


def test_too_many_bad_samples_stop_the_run(spoiled, tokenizer):
    config = run_config({"one": spoiled}, data={"max_pixels": 10_000, "max_bad_rate": 0.1})
    with make(config, tokenizer) as loader:
        batches = loader.batches(0)
        list(islice(batches, 9))
        with pytest.raises(DataError, match=r"source 'one': .* bad .*max_bad_rate"):
            next(batches)  # the hundredth sample is in the tenth batch


def test_source_of_bad_samples_only_is_rejected(make_pairs, tokenizer):
    folder = make_pairs("bad", [12], {(0, n): {"jpg": b"\xff\xd8 no picture", "txt": b"thing"} for n in range(12)})
    index_shards(Storage(), folder)
    with pytest.raises(DataError, match=r"source 'one': .* is bad .*and so were 16 candidates"):
        take(run_config({"one": folder}), tokenizer, 0, 1)


def test_data_changes_the_digest_and_loader_settings_do_not(folders, tokenizer, make_tar, make_pair):
    def digest(config: RunConfig, vocabulary: Tokenizer = tokenizer) -> str:
        with make(config, vocabulary) as loader:
            return loader.digest

    base = digest(run_config(folders))
    assert digest(run_config(folders, data={"loader": {"threads_per_worker": 7, "prefetch_batches": 5}})) == base
    changed = [
        run_config(folders, data={"augment": {"magnitude": 3}}),
        run_config(folders, data={"max_pixels": 1000}),
        run_config(folders, stage={"masking": {"mlm_probability": 0.3}}),
        run_config(folders, stage={"max_text_length": 9}),
        run_config(folders, seed=4),
        run_config(folders, stage={"name": "other"}),
    ]
    digests = {digest(config) for config in changed}
    digests.add(digest(run_config(folders), Tokenizer.train(["other words"], 100)))
    assert len(digests) == 7
    assert base not in digests
    Path(folders["one"], "00001.tar").write_bytes(make_tar({str(n): make_pair(n + 40) for n in range(4)}))
    index_shards(Storage(), folders["one"])
    assert digest(run_config(folders)) != base


def test_errors_are_raised_in_their_own_step(folders, tokenizer, monkeypatch: pytest.MonkeyPatch):
    config = run_config(folders, data={"loader": {"threads_per_worker": 3, "prefetch_batches": 4}})
    make_rows = module.ExampleBuilder.build

    def failing(maker: module.ExampleBuilder, step: int, *rest):
        if step == 3:
            raise DataError("the store is gone")
        return make_rows(maker, step, *rest)

    monkeypatch.setattr(module.ExampleBuilder, "build", failing)
    batches = make(config, tokenizer).batches(0)
    assert [batch.step for batch in islice(batches, 3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"the store is gone"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_close_ends_every_thread_and_iterator(folders, tokenizer):
    loader = make(run_config(folders), tokenizer)
    batches = loader.batches(0)
    next(batches)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
    assert list(batches) == []


def test_waiting_time_is_measured(folders, tokenizer):
    with make(run_config(folders), tokenizer) as loader:
        list(islice(loader.batches(0), 3))
        assert 0 < loader.wait_seconds < 30


def test_epochs_continue_after_a_restart(folders, tokenizer):
    config = run_config({"one": folders["one"]})
    with make(config, tokenizer) as loader:
        list(islice(loader.batches(23), 1))
        assert loader.counts()["epochs/one"] == pytest.approx(10 + 10 / 23)


def test_missing_folders_and_shards_are_named_at_the_start(folders, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"absent: no such folder of shards"):
        make(run_config(folders | {"one": str(tmp_path / "absent")}), tokenizer)
    Path(folders["two"], "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar: the shard is missing"):
        make(run_config(folders), tokenizer)


@pytest.mark.parametrize(("caption", "may_flip"), [("a thing at left", False), ("a thing", True)])
def test_images_are_not_flipped_if_a_caption_names_a_side(
    make_pairs, make_pair, tokenizer, monkeypatch: pytest.MonkeyPatch, caption: str, may_flip: bool
):
    captions = json.dumps({"captions": [caption]}).encode()
    folder = make_pairs("sides", [10], {(0, n): make_pair(n) | {"json": captions} for n in range(10)})
    index_shards(Storage(), folder)
    allowed = set()
    augment = module.augment
    monkeypatch.setattr(module, "augment", lambda *args: allowed.add(args[4]) or augment(*args))
    take(run_config({"one": folder}), tokenizer, 0, 1)
    assert allowed == {may_flip}


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_cache_smaller_than_open_windows_is_rejected(s3, folders, tokenizer, tmp_path: Path):
    storage, url = Storage(s3.config), s3.url("one")
    for file in sorted(Path(folders["one"]).iterdir()):
        storage.upload(file, f"{url}/{file.name}")
    sizes = sum(file.stat().st_size for file in Path(folders["one"]).glob("*.tar"))

    def loader(max_bytes: int) -> Loader:
        cache = {"folder": str(tmp_path / "cache"), "max_bytes": max_bytes}
        run = run_config({"one": url}, data={"cache": cache}, storage=s3.config.model_dump())
        return make(run, tokenizer)

    with pytest.raises(ConfigError, match=rf"max_bytes {sizes - 1} is below the {sizes} bytes of the open windows"):
        loader(sizes - 1)
    with loader(sizes) as enough:
        assert len(next(enough.batches(0))) == 10


@pytest.fixture
def wordy(make_pairs, make_pair) -> str:
    """Return a source of forty pairs with captions of 1 to 20 words; odd ones score 0.1, the others 0.9."""

    def members(number: int) -> dict[str, bytes]:
        caption = " ".join(["thing"] * (1 + number * 7 % 20))
        described = {"captions": [caption], "score": 0.1 if number % 2 else 0.9}
        return make_pair(number) | {"json": json.dumps(described).encode()}

    planted = {(shard, sample): members(20 * shard + sample) for shard in range(2) for sample in range(20)}
    folder = make_pairs("wordy", [20, 20], planted)
    index_shards(Storage(), folder)
    return folder


def wordy_config(folder: str, stage: dict, source: dict | None = None) -> RunConfig:
    config = run_config(
        {"wordy": folder}, stage={"max_text_length": 30, "global_batch_size": 5, **stage}, data={"shuffle_window": 4}
    )
    values = config.model_dump(mode="json", exclude_unset=True)
    values["sources"]["wordy"] |= source or {}
    return validate(values, "test")


def test_buckets_group_captions_of_similar_length(wordy, tokenizer):
    plain = wordy_config(wordy, {})
    bucketed = wordy_config(wordy, {"buckets": {"by": "caption", "batches": 8}})
    prints = {
        fingerprint(
            with_loader(bucketed, num_workers=workers),
            bucketed.stages[0],
            batch_groups(with_loader(bucketed, num_workers=workers), bucketed.stages[0]),
            Storage(),
            tokenizer,
            range(9),
            world,
        )
        for world, workers in ((1, 0), (2, 0), (3, 0), (1, 2))
    }
    assert len(prints) == 1
    epoch = {kind: take(config, tokenizer, 0, 8) for kind, config in (("plain", plain), ("bucketed", bucketed))}
    padding = {kind: sum(int((~batch.text_keep).sum()) for batch in epoch[kind]) for kind in epoch}
    assert padding["bucketed"] < padding["plain"] / 2
    uids = {kind: sorted(uid for batch in epoch[kind] for uid in batch.uid.tolist()) for kind in epoch}
    assert uids["bucketed"] == uids["plain"], "a block of one epoch holds the same samples in another order"


def test_filters_and_opt_outs_are_respected(wordy, tokenizer, tmp_path: Path):
    (tmp_path / "opt_out.txt").write_text("wordy00004\nwordy00020\n")
    source = {"filters": {"score": {"min": 0.5}}, "opt_out": str(tmp_path / "opt_out.txt")}
    config = wordy_config(wordy, {}, source)
    config = config.model_copy(update={"output": str(tmp_path / "runs")})
    with make(config, tokenizer) as loader, make(wordy_config(wordy, {}), tokenizer) as whole:
        chosen = [uid for batch in islice(loader.batches(0), 18) for uid in batch.uid.tolist()]
        everything = {uid for batch in islice(whole.batches(0), 8) for uid in batch.uid.tolist()}
        assert loader.digest != whole.digest
    assert set(Counter(chosen).values()) == {5}, "18 batches of 5 are five epochs of 18 samples"
    assert len(set(chosen)) == 18
    assert set(chosen) < everything


def test_stage_image_size_overrides_the_model(folders, tokenizer):
    usual, larger = run_config(folders), run_config(folders, stage={"image_size": 24})
    (before,), (after,) = take(usual, tokenizer, 0, 1), take(larger, tokenizer, 0, 1)
    assert before.image.shape[1:] == (16, 16, 3)
    assert after.image.shape[1:] == (24, 24, 3)
    assert torch.equal(before.uid, after.uid)
    assert torch.equal(before.masked_text, after.masked_text)
    with make(usual, tokenizer) as one, make(larger, tokenizer) as other:
        assert one.digest != other.digest
