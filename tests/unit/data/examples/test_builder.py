"""Examples from tars to batches: questions, statements, classes, masked images, and images of any shape (ViLT)."""

import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from transformers.models.vilt.image_processing_pil_vilt import get_resize_output_image_size

from pipeline.config.schema import AugmentConfig, RunConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.contents.images import KeepAspectRatio, on_one_canvas, resize
from pipeline.data.contents.text import Tokenizer
from pipeline.data.examples.augment import augment
from pipeline.data.randomness import CounterRandom
from pipeline.data.reading.samples import iter_captions, iter_samples
from pipeline.data.shards.check import check_shards, sample_defect
from pipeline.data.shards.tar import TarSample
from pipeline.data.storage import Storage
from tests.support.data_stream import data_config, hash_of, open_loader, take
from tests.support.fine_tuning_data import COLOURS, image_of_sides, run_config
from tests.support.pairs import pair, write_indexed

OBJECTIVES = {"questions": "vqa", "statements": "nlvr2", "labelled": "classification"}
KEYS: dict[str, dict[str, int]] = {"questions": {"num_answers": 6}, "labelled": {"num_classes": 4}}
MASKING = {"image_mask_ratio": 0.5, "patch_shape": "blocks", "mask_token_prob": 0.8, "random_patch_prob": 0.1}


def drawn_config(folder: Path, source_type: str) -> RunConfig:
    return run_config(folder, source_type, OBJECTIVES[source_type], 1, **KEYS.get(source_type, {}))


@pytest.mark.parametrize(("source_type", "other"), [*pairwise(OBJECTIVES), ("labelled", "questions")])
def test_examples_hold_what_the_objective_reads_on_any_number_of_ranks(tmp_path: Path, source_type, other) -> None:
    config = drawn_config(tmp_path, source_type)
    for sample in list(iter_samples(Storage(), config.sources["test"].shards))[:3]:  # the shard check agrees
        defects = [sample_defect(t, 10**6, None, TarSample("s", False, sample.members)) for t in (source_type, other)]
        assert [defect is None for defect in defects] == [True, False]
    tokenizer = Tokenizer.train([*iter_captions(Storage(), config.sources["train"].shards), "x"], 200)
    (batch,) = take(config, tokenizer=tokenizer)
    parts = [take(config, tokenizer=tokenizer, rank=rank, world_size=3)[0] for rank in range(3)]
    for name in ("image", "second_image", "label", "answers", "answer_scores"):
        if (expected := getattr(batch, name)) is not None:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), expected), name
    if source_type == "questions":
        listed = batch.answers >= 0
        assert batch.label is batch.second_image is None
        assert listed.sum(dim=1).tolist() == [1] * 32  # "dark red" and its like are not listed
        assert batch.answers[listed].max() < len(COLOURS)
        assert torch.equal(batch.answer_scores, listed.float())
    if source_type == "statements":
        assert batch.image.shape == batch.second_image.shape == (32, 32, 32, 3)
        assert set(batch.label.tolist()) == {0, 1}
        redness = torch.stack([batch.image, batch.second_image]).float().mean(dim=(2, 3)) @ torch.tensor([1.0, 0, -1])
        assert (redness[0] != redness[1]).all()  # one image has red shapes, the other blue ones


def test_list_of_answers_enters_the_digest_and_an_answer_that_names_a_side_prevents_mirroring(tmp_path: Path) -> None:
    config, digests = drawn_config(tmp_path, "questions"), set()
    (tmp_path / "other.json").write_text(json.dumps(["no", *COLOURS, "yes"]))
    for answers in (f"{tmp_path}/questions-0/answers.json", f"{tmp_path}/other.json"):
        stage = config.stages[0].model_copy(update={"answer_list": answers})
        with open_loader(config.model_copy(update={"stages": (stage,)})) as loader:
            digests.add(loader.digest)
    assert len(digests) == 2
    for answer, is_flipped in (("up", True), ("left", False)):  # the question names no side
        record = json.dumps({"question": "where is it?", "answers": {answer: 1.0}}).encode()
        samples = [{"__key__": f"s{number}", "jpg": image_of_sides(), "json": record} for number in range(32)]
        write_shards(Storage(), samples, str(tmp_path / answer))
        train = config.sources["train"].model_copy(update={"shards": str(tmp_path / answer)})
        (batch,) = take(config.model_copy(update={"sources": {"train": train}, "stages": (stage,)}))
        left, right = (half.float().mean(dim=(1, 2, 3)) for half in (batch.image[:, :, :8], batch.image[:, :, -8:]))
        assert bool((left < right).all()) is not is_flipped


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    """Return a folder of two tars with 18 images of class n % 4, three of which have a missing or bad class."""
    samples = [{"jpg": pair(number)["jpg"], "cls": b"%d\n" % (number % 4)} for number in range(18)]
    del samples[3]["cls"]
    samples[7]["cls"], samples[11]["cls"] = b"cat", b"4"
    return write_indexed(tmp_path, *({f"s{n:02d}": samples[n] for n in shard} for shard in (range(10), range(10, 18))))


def vit_config(folder: str, source_type: str, objective: str, **stage: Any) -> RunConfig:
    vit = {"kind": "vit", "width": 16, "layers": 1, "heads": 2, "image_size": 32, "patch_size": 4}
    stage = {"global_batch_size": 9, "num_classes": 4, **stage}
    return data_config({"one": folder}, (objective,), source_type, vit, {"streams": 3}, stage)


def test_images_have_their_class_and_bad_ones_are_replaced(labelled: str) -> None:
    with open_loader(vit_config(labelled, "labelled", "classification")) as loader:
        batches, bad = list(islice(loader.batches(0), 4)), loader.quarantined()
    labels, images = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("label", "image_id"))
    assert (labels.dtype, set(labels.tolist())) == (torch.int64, set(range(4)))
    assert (batches[0].image.shape, batches[0].text) == ((9, 32, 32, 3), None)
    assert len(set(zip(labels.tolist(), images.tolist(), strict=True))) == len(set(images.tolist()))
    reasons = {record["key"]: record["reason"] for record in bad}
    expected = {"s03": "no class", "s07": "'cat'", "s11": "its class is 4; expected 0 to 3"}
    assert {key: expected[key] in reason for key, reason in reasons.items()} == dict.fromkeys(expected, True)
    findings = [bad for report in check_shards(Storage(), labelled, "labelled", 10**7, 1) for bad in report.bad]
    assert {(bad.key, bad.stage) for bad in findings} == {("s03", "label"), ("s07", "label")}  # 4: the stage's bound


def test_every_example_has_the_same_number_of_masked_patches_on_any_number_of_ranks(labelled: str) -> None:
    config, plain = (vit_config(labelled, "images", "mim", **masking) for masking in ({"masking": MASKING}, {}))
    hashes = {hash_of(config, range(1, 4), world) for world in (1, 2, 4)}
    assert (len(hashes), hash_of(plain, range(1, 4)) in hashes) == (1, False)
    batches = take(config, 20)
    names = ("patch_positions", "patch_replacements")
    positions, shown = (torch.cat([getattr(batch, name) for batch in batches]) for name in names)
    assert positions.shape == shown.shape == (180, 32)
    assert (shown == -1).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown == positions).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert take(plain)[0].patch_replacements is None


PAPER, RELEASE = KeepAspectRatio(384, 640, 32), KeepAspectRatio(384, 639, 32)
SHAPES = [(24, 24), (24, 40), (40, 24), (24, 30), (8, 60), (60, 8), (33, 24), (24, 37), (48, 24), (24, 48), (31, 50)]


def noise(height: int, width: int, number: int = 0) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_sizes_are_those_of_hugging_faces_processor_with_at_least_one_patch_per_side() -> None:
    """The release's longest side is int(1333 / 800 * 384); it floors the short side of images 20 x as long to 0."""
    for height, width in np.random.default_rng(0).integers(150, 1200, (300, 2)).tolist():
        blank = np.zeros((height, width, 3), dtype=np.uint8)
        for shape in (PAPER, RELEASE):
            expected = get_resize_output_image_size(blank, shape.shorter, shape.longest, 32, "channels_last")
            assert shape.sides(height, width) == expected, (height, width)
    for shape, most in ((PAPER, (384, 640)), (RELEASE, (384, 608))):  # 240 and 228 patches
        assert max(shape.sides(300, width) for width in range(300, 900)) == most
    for height, width in ((10, 1000), (1000, 10), (1, 5000), (1, 1), (333, 500)):
        rows, columns = PAPER.sides(height, width)
        assert 32 <= min(rows, columns) <= max(rows, columns) <= 640
        assert (rows % 32, columns % 32, rows * columns // 32**2 <= 240) == (0, 0, True)
        assert resize(np.zeros((height, width, 3), dtype=np.uint8), PAPER).shape == (rows, columns, 3)


def test_crops_keep_aspect_ratio_and_area_fraction_and_images_are_padded_at_the_bottom_and_right() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 150, 3)).copy()
    shape, plain = KeepAspectRatio(48, 64, 16), AugmentConfig(crop_scale=(1.0, 1.0), flip=False, num_ops=0)
    cropping = plain.model_copy(update={"crop_scale": (0.25, 1.0)})
    for key in range(20):
        crop = augment(ramp, cropping, shape, CounterRandom(key), allow_flip=False)
        assert crop.shape[:2] == shape.sides(200, 150)
        fraction = (int(crop[-1, 0, 0]) - int(crop[0, 0, 0]) + 4) / 200  # 4 of the image's rows make up one of these
        assert 0.45 <= fraction <= 1.03
    image = noise(300, 420)
    for key in range(3):
        assert (augment(image, plain, shape, CounterRandom(key), allow_flip=True) == resize(image, shape)).all()
    images = [noise(8, 24), noise(16, 8), noise(8, 8)]
    canvases, sizes = on_one_canvas(images)
    assert (canvases.shape, sizes.tolist()) == ((3, 16, 24, 3), [[8, 24], [16, 8], [8, 8]])
    for image, canvas, (height, width) in zip(images, canvases, sizes, strict=True):
        assert (canvas == np.pad(image, ((0, 16 - height), (0, 24 - width), (0, 0)))).all()


def encode(number: int) -> bytes:
    return simplejpeg.encode_jpeg(noise(*SHAPES[number % len(SHAPES)], number), 90, "RGB", "444")


@pytest.fixture
def shaped(tmp_path: Path) -> str:
    samples = [{f"s{n}": pair(n) | {"jpg": encode(n)} for n in range(first, first + 11)} for first in (0, 11, 22)]
    return write_indexed(tmp_path / "shaped", *samples)


def vilt_config(
    folder: str, model: dict | None = None, source_type: str = "pairs", objectives=("mlm", "itm", "mim"), **stage
) -> RunConfig:
    sizes = {"width": 32, "layers": 2, "heads": 2, "image_size": 24, "longest_side": 40, "patch_size": 8}
    vilt = {"kind": "vilt", **sizes, "max_visible_patches": 10, **(model or {})}
    return data_config({"pairs": folder}, objectives, source_type, vilt, stage={"negatives": "random"} | stage)


def test_batches_are_cut_to_the_largest_image_which_buckets_reduce_and_to_visible_patches(shaped: str) -> None:
    visible_of = defaultdict[int, set[tuple[int, ...]]](set)
    for batch in take(vilt_config(shaped, masking={"image_mask_ratio": 0.3}), 12):
        assert batch.image.shape[1:3] == tuple(batch.image_size.max(dim=0).values.tolist())
        assert (batch.image_size % 8 == 0).all()
        counts, is_visible = (batch.image_size // 8).prod(dim=1), batch.visible_patches >= 0
        assert torch.equal(is_visible.sum(dim=1), counts.clamp(max=10))
        assert is_visible.any(dim=0).all()
        for row, count in enumerate(counts.tolist()):
            visible = batch.visible_patches[row][is_visible[row]]
            assert visible.unique().tolist() == visible.tolist()  # ascending
            assert visible[-1] < count
            height, width = batch.image_size[row].tolist()
            assert not any(outside.any() for outside in (batch.image[row, height:], batch.image[row, :, width:]))
            masked = set(batch.patch_positions[row].tolist()) - {-1}
            assert masked <= set(visible.tolist())
            assert len(masked) == max(1, round(0.3 * len(visible)))  # the same fraction of the visible patches
            if count > 10:
                visible_of[int(batch.uid[row])].add(tuple(visible.tolist()))
    assert min(len(drawn) for drawn in visible_of.values()) > 1  # they differ between epochs
    (batch,) = take(vilt_config(shaped, {"max_visible_patches": None}))
    assert torch.equal((batch.visible_patches >= 0).sum(dim=1), (batch.image_size // 8).prod(dim=1))
    texts = [take(vilt_config(shaped, None, kind, ("mim",)))[0].text for kind in ("pairs", "images")]
    assert [text is None for text in texts] == [False, True]
    areas = []
    for stage in ({}, {"buckets": {"by": "image", "batches": 6}}):  # which group similar shapes
        batches = take(vilt_config(shaped, **stage), 12)
        areas.append(np.mean([batch.image.shape[1] * batch.image.shape[2] for batch in batches]))
    assert areas[1] < 0.95 * areas[0]


def test_every_field_enters_the_fingerprint_and_the_shape_of_images_the_digest(shaped: str) -> None:
    config = vilt_config(shaped, masking={"mask_token_prob": 0.8, "random_patch_prob": 0.1})
    assert len({hash_of(config, range(2, 6), world) for world in (1, 2, 5)}) == 1
    (batch,), fingerprints, digests = take(vilt_config(shaped)), set(), set()
    for name in ("", "image", "image_size", "visible_patches", "patch_positions"):
        changed, digest = batch, hashlib.sha256()
        if name:
            (values := getattr(batch, name).clone()).view(-1)[0] += 8 if name == "image_size" else 1
            changed = replace(batch, **{name: values})
        changed.hash_into(digest)
        fingerprints.add(digest.hexdigest())
    for model in ({}, {"longest_side": 48}, {"max_visible_patches": 9}, {"image_size": 32}):
        with open_loader(vilt_config(shaped, model)) as loader:
            digests.add(loader.digest)
    assert (len(fingerprints), len(digests)) == (5, 4)


def test_both_images_of_a_statement_keep_their_shape(tmp_path: Path) -> None:
    statement = json.dumps({"sentence": "picture 3 shows a thing", "label": True, "id": "1"}).encode()
    samples = {f"s{n}": {"0.jpg": encode(n), "1.jpg": encode(n + 3), "json": statement} for n in range(10)}
    (batch,) = take(vilt_config(write_indexed(tmp_path, samples), None, "statements", ("nlvr2",)))
    assert batch.visible_patches is None
    for image, size in ((batch.image, batch.image_size), (batch.second_image, batch.second_image_size)):
        assert image.shape[1:3] == tuple(size.max(dim=0).values.tolist())
    assert not torch.equal(batch.image_size, batch.second_image_size)
