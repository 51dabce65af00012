"""Regions of detectors, tested on tiny random ones, and `mome shards regions` with its actor in this process."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers as hf

from jobs.shards.regions import Detector, detector_digest
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.regions import parse_regions
from pipeline.data.quarantine import BadSample
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.storage import Storage
from tests.support.shards_command import FEATURES, facts_of, run_shards, save_yolos

QUERIES, BAD = 9, b"\xff\xd8\xff no picture"
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_RESNET = hf.ResNetConfig(**_STAGES, out_features=["stage4"])
_RT_RESNET = hf.RTDetrResNetConfig(**_STAGES, out_features=["stage2", "stage3", "stage4"])
_RT_SIZES = {"encoder_in_channels": [8, 8, 16], "encoder_hidden_dim": 16, "decoder_in_channels": [16, 16, 16]}
_TRANSFORMER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": QUERIES, "num_labels": 5,
}  # fmt: skip
_YOLOS = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": [32, 48], "patch_size": 8, "num_detection_tokens": QUERIES, "num_labels": 5,
}  # fmt: skip
_DETR = hf.DetrConfig(backbone_config=_RESNET, use_timm_backbone=False, backbone=None, **_TRANSFORMER)
_RT_DETR = hf.RTDetrConfig(backbone_config=_RT_RESNET, **_RT_SIZES, **_TRANSFORMER)
SIDES = {"shortest_edge": 32, "longest_edge": 48}
FAMILIES: dict[str, tuple[Any, Any, Any]] = {  # model, its config, processor
    # a decoder with a class for "nothing"
    "detr": (hf.DetrForObjectDetection, _DETR, hf.DetrImageProcessorPil(size=SIDES)),
    # a decoder with a sigmoid for each class
    "rt_detr": (hf.RTDetrForObjectDetection, _RT_DETR, hf.RTDetrImageProcessorPil(size={"height": 64, "width": 64})),
    # an encoder with detection tokens after those of the patches
    "yolos": (hf.YolosForObjectDetection, hf.YolosConfig(**_YOLOS), hf.YolosImageProcessorPil(size=SIDES)),
}


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def save(family: str, folder: Path) -> Path:
    """Save a detector whose queries differ, as those of a trained one do."""
    make, config, processor = FAMILIES[family]
    torch.manual_seed(0)
    model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_region_has_its_query_vector_box_and_class(tmp_path: Path, family: str, image: np.ndarray) -> None:
    """The reference is transformers' own post-processing, which discards the query vectors."""
    detector = Detector(save(family, tmp_path), torch.device("cpu"))
    record = detector(image, 100)
    with torch.inference_mode():
        output = detector._model(**detector._prepare(images=image, return_tensors="pt"))
    expected = detector._prepare.post_process_object_detection(output, threshold=0.0, target_sizes=[(40, 60)])[0]
    order = torch.argsort(expected["scores"], descending=True, stable=True)
    # With a no-object class each query occurs once; otherwise (query, class) pairs, of which ours is the first.
    has_nothing = family in ("detr", "yolos")
    order = order if has_nothing else order[:1]
    for name, ours in (("scores", record.confidences), ("labels", record.classes)):
        np.testing.assert_allclose(ours[: len(order)], expected[name][order], atol=1e-6)
    boxes = expected["boxes"][order].numpy().clip(0, [60, 40, 60, 40])
    np.testing.assert_allclose(record.boxes[: len(order)], boxes, atol=1e-3)
    assert (len(record.features), record.image_size) == (QUERIES, (40, 60))
    assert (np.diff(record.confidences) <= 0).all()
    hidden = output.last_hidden_state[0, -QUERIES:].numpy()
    query = [int(np.abs(hidden - vector).sum(axis=1).argmin()) for vector in record.features]
    assert sorted(query) == list(range(QUERIES))
    logits = output.logits[0, :, :-1] if has_nothing else output.logits[0]
    assert record.classes.tolist() == logits.argmax(dim=1)[query].tolist()
    few, whole = (parse_regions(detector(image, count).to_bytes()) for count in (4, 9))
    for name in ("features", "boxes", "classes", "confidences"):  # the most confident are kept
        assert np.array_equal(getattr(few, name), getattr(whole, name)[:4])
    assert int(whole.classes.max()) < 5


def test_unusable_detectors_and_refused_images_are_named(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = save("yolos", tmp_path / "one"), save("yolos", tmp_path / "other")
    assert detector_digest(one) == detector_digest(other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert detector_digest(one) != detector_digest(other)
    with pytest.raises(ConfigError, match=r"no such folder.*nothing is downloaded"):
        detector_digest(tmp_path / "facebook/detr-resnet-50")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no detector that transformers can load"):
        Detector(tmp_path, torch.device("cpu"))
    detector = Detector(one, torch.device("cpu"))
    monkeypatch.setattr(detector, "_prepare", Mock(side_effect=ValueError("too thin")))
    with pytest.raises(BadSample, match="too thin"):
        detector(image, 10)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[Detector.__module__]  # jobs.shards.regions is the command
    detect = Mock(side_effect=lambda actor, shards, _: [actor.detect(*shard) for shard in shards.items()])
    monkeypatch.setattr(module, "_on_actors", detect)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_yolos(tmp_path_factory.mktemp("detector"))


@pytest.fixture
def pairs(make_pairs, make_pair) -> str:
    return make_pairs("pairs", [4, 3, 5], planted={(1, 2): {"jpg": BAD, "json": make_pair(0)["json"]}})


def samples(folder: object) -> dict[str, Sample]:
    return {sample.key: sample for sample in iter_samples(Storage(), str(folder))}


def test_samples_keep_their_members_and_get_regions(
    pairs: str, detector: Path, tmp_path: Path, make_pairs, make_pair
) -> None:
    out, report = tmp_path / "out", tmp_path / "bad.jsonl"
    options = ("--detector", detector, "--regions", 7, "--report", report, "--json")
    result = run_shards("regions", pairs, out, *options)
    facts, finding = json.loads(result.stdout.splitlines()[-1]), json.loads(report.read_text())
    assert (facts["url"], facts["num_samples"], facts["shards"], facts["bad_samples"]) == (str(out), 12, 3, 1)
    assert (finding["key"], finding["shard"], finding["stage"]) == ("pairs00006", "00001.tar", "image")
    assert "pairs00006" in result.stderr
    run_shards("index", pairs)
    before, after = samples(pairs), samples(out)
    assert list(before) == list(after)
    for key, sample in before.items():
        regions = after[key].members.pop("npz", None)
        assert (after[key].members, after[key].image_id) == (sample.members, sample.image_id)
        assert (regions is None) == (key == "pairs00006")
        if regions is not None:
            record = parse_regions(regions)
            assert (record.features.shape, record.image_size) == ((7, FEATURES), (24, 24))
    bad = {"jpg": BAD, "json": make_pair(0)["json"], "npz": b"old"}  # old regions are replaced, or removed
    old = make_pairs("old", [2], planted={(0, 0): make_pair(1) | {"npz": b"old"}, (0, 1): bad})
    facts_of("regions", old, tmp_path / "replaced", "--detector", detector)
    intact, damaged = samples(tmp_path / "replaced").values()
    assert parse_regions(intact.members["npz"]).features.shape[1] == FEATURES
    assert "npz" not in damaged.members


def test_only_missing_and_replaced_shards_are_processed(
    pairs: str, detector: Path, tmp_path: Path, make_tar, make_pair
) -> None:
    out = tmp_path / "out"
    whole = facts_of("regions", pairs, out, "--detector", detector)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "00000.tar").unlink()  # its record was written before
    (out / "manifest.json").unlink()
    again = facts_of("regions", pairs, out, "--detector", detector)
    assert again == whole  # the record of the bad sample is read from the earlier call
    changed = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != kept[path.name]}
    assert changed == {"00000.tar"}
    (Path(pairs) / "00002.tar").write_bytes(make_tar({"new": make_pair(99)}))
    assert facts_of("regions", pairs, out, "--detector", detector)["num_samples"] == 8
    assert "npz" in samples(out)["new"].members


def test_unusable_arguments_and_shards_are_rejected(pairs: str, detector: Path, tmp_path: Path, make_pairs) -> None:
    out = tmp_path / "out"
    missing = run_shards("regions", pairs, out, "--detector", tmp_path / "none", fails=ConfigError)
    assert "nothing is downloaded" in str(missing.exception)
    assert not out.exists()
    facts_of("regions", pairs, out, "--detector", detector)
    texts = make_pairs("texts", [1], planted={(0, 0): {"txt": b"one"}})
    cut = make_pairs("cut", [4, 3])
    os.truncate(Path(cut) / "00001.tar", 2000)
    for url, target, options, kind, reason in (
        (pairs, out, ("--regions", 3), ConfigError, "other --regions"),
        (pairs, make_pairs("other", [2]), (), ConfigError, "none of these shards with regions"),
        (pairs, os.path.relpath(pairs), (), ConfigError, "choose another folder than"),
        (texts, tmp_path / "out2", (), DataError, "no sample has an image that the detector could read"),
        (cut, tmp_path / "out3", (), DataError, "00001.tar: the shard is truncated"),
    ):
        result = run_shards("regions", url, target, "--detector", detector, *options, fails=kind)
        assert reason in str(result.exception)
    assert not (tmp_path / "out3" / "00001.tar").exists()
