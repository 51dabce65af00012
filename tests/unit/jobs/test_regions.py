"""Regions of detectors, tested on tiny random ones, and `mome shards regions` with its actor in this process."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers as hf

from jobs.shards.detection import Detector, RegionActor
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.regions import parse_regions
from pipeline.data.quarantine import BadSample
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.storage import Storage
from tests.support.shards_command import FEATURES, facts_of, run_shards, save_yolos

BAD = b"\xff\xd8\xff no picture"
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_RT_SIZES = {"encoder_in_channels": [8, 8, 16], "encoder_hidden_dim": 16, "decoder_in_channels": [16, 16, 16]}
_TRANSFORMER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 9, "num_labels": 5,
}  # fmt: skip


def save_detector(family: str, folder: Path) -> Path:
    model: Any
    if family == "yolos":  # an encoder with detection tokens after those of the patches
        return save_yolos(folder)
    if family == "detr":  # a decoder with a class for "nothing"
        backbone: Any = hf.ResNetConfig(**_STAGES, out_features=["stage4"])
        config = hf.DetrConfig(backbone_config=backbone, use_timm_backbone=False, backbone=None, **_TRANSFORMER)
        model = hf.DetrForObjectDetection(config)
        processor = hf.DetrImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 48})
    else:  # a decoder with a sigmoid for each class
        backbone = hf.RTDetrResNetConfig(**_STAGES, out_features=["stage2", "stage3", "stage4"])
        model = hf.RTDetrForObjectDetection(hf.RTDetrConfig(backbone_config=backbone, **_RT_SIZES, **_TRANSFORMER))
        processor = hf.RTDetrImageProcessorPil(size={"height": 64, "width": 64})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["detr", "rt_detr", "yolos"])
def test_region_has_its_query_vector_box_and_class(tmp_path: Path, family: str) -> None:
    """The reference is transformers' own post-processing, which discards the query vectors."""
    detector = Detector(save_detector(family, tmp_path), torch.device("cpu"))
    torch.manual_seed(0)
    with torch.inference_mode():
        for parameter in detector._model.parameters():  # queries differ, as those of a trained detector do
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        output = detector._model(**detector._prepare(images=IMAGE, return_tensors="pt"))
    record, queries = detector(IMAGE, 100), len(output.logits[0])
    expected = detector._prepare.post_process_object_detection(output, threshold=0.0, target_sizes=[(40, 60)])[0]
    order = torch.argsort(expected["scores"], descending=True, stable=True)
    # With a no-object class each query occurs once; otherwise (query, class) pairs, of which ours is the first.
    order = order[:1] if family == "rt_detr" else order
    for name, ours in (("scores", record.confidences), ("labels", record.classes)):
        np.testing.assert_allclose(ours[: len(order)], expected[name][order], atol=1e-6)
    boxes = expected["boxes"][order].numpy().clip(0, [60, 40, 60, 40])
    np.testing.assert_allclose(record.boxes[: len(order)], boxes, atol=1e-3)
    assert (len(record.features), record.image_size) == (queries, (40, 60))
    assert (np.diff(record.confidences) <= 0).all()
    hidden = output.last_hidden_state[0, -queries:].numpy()
    query = [int(np.abs(hidden - vector).sum(axis=1).argmin()) for vector in record.features]
    assert sorted(query) == list(range(queries))
    assert record.classes.tolist() == output.logits[0, :, :5].argmax(dim=1)[query].tolist()
    few, whole = (parse_regions(detector(IMAGE, count).to_bytes()) for count in (4, queries))
    for name in ("features", "boxes", "classes", "confidences"):  # the most confident are kept
        assert np.array_equal(getattr(few, name), getattr(whole, name)[:4])


def test_unusable_detectors_and_refused_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no detector that transformers can load"):
        Detector(tmp_path, torch.device("cpu"))
    detector = Detector(save_yolos(tmp_path / "one"), torch.device("cpu"))
    detector._prepare = Mock(side_effect=ValueError("too thin"))
    with pytest.raises(BadSample, match="too thin"):
        detector(IMAGE, 10)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_yolos(tmp_path_factory.mktemp("detector"))


@pytest.fixture
def pairs(make_pairs, make_pair, monkeypatch: pytest.MonkeyPatch) -> str:
    def in_this_process(arguments: tuple[Any, ...], shards: dict[str, Any], _: object) -> list[Any]:
        return [RegionActor(*arguments).detect(*shard) for shard in shards.items()]

    monkeypatch.setattr("jobs.shards.detection._on_actors", in_this_process)
    return make_pairs("pairs", [4, 3, 5], planted={(1, 2): {"jpg": BAD, "json": make_pair(0)["json"]}})


def samples(folder: object) -> dict[str, Sample]:
    return {sample.key: sample for sample in iter_samples(Storage(), str(folder))}


def test_samples_keep_their_members_and_get_regions(
    pairs: str, detector: Path, tmp_path: Path, make_pairs, make_pair
) -> None:
    out, report = tmp_path / "out", tmp_path / "bad.jsonl"
    result = run_shards("regions", pairs, out, "--detector", detector, "--regions", 7, "--report", report, "--json")
    facts, finding = json.loads(result.stdout.splitlines()[-1]), json.loads(report.read_text())
    assert (facts["url"], facts["num_samples"], facts["shards"], facts["bad_samples"]) == (str(out), 12, 3, 1)
    assert (finding["key"], finding["shard"], finding["stage"]) == ("pairs00006", "00001.tar", "image")
    assert "pairs00006" in result.stderr
    run_shards("index", pairs)
    before, after = samples(pairs), samples(out)
    regions = {key: sample.members.pop("npz") for key, sample in after.items() if "npz" in sample.members}
    assert {k: (s.members, s.image_id) for k, s in after.items()} == {
        k: (s.members, s.image_id) for k, s in before.items()
    }
    assert list(before) == list(after)
    assert before.keys() - regions.keys() == {"pairs00006"}
    for record in map(parse_regions, regions.values()):
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
    # The record of the bad sample is read from the earlier call.
    assert facts_of("regions", pairs, out, "--detector", detector) == whole
    assert [path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != kept[path.name]] == ["00000.tar"]
    (Path(pairs) / "00002.tar").write_bytes(make_tar({"new": make_pair(99)}))
    assert facts_of("regions", pairs, out, "--detector", detector)["num_samples"] == 8
    assert "npz" in samples(out)["new"].members


def test_unusable_arguments_and_shards_are_rejected(pairs: str, detector: Path, tmp_path: Path, make_pairs) -> None:
    out = tmp_path / "out"
    missing = run_shards("regions", pairs, out, "--detector", tmp_path / "none", fails=ConfigError)
    assert "nothing is downloaded" in str(missing.exception)
    assert not out.exists()
    facts_of("regions", pairs, out, "--detector", detector)
    texts, cut = make_pairs("texts", [1], planted={(0, 0): {"txt": b"one"}}), make_pairs("cut", [4, 3])
    os.truncate(Path(cut) / "00001.tar", 2000)
    damaged = facts_of("regions", pairs, tmp_path / "damaged", "--detector", detector)["url"]
    (Path(damaged) / "00001.tar.regions.json").write_text('{"shard": 1}')
    changed = save_yolos(tmp_path / "changed")
    assert facts_of("regions", pairs, out, "--detector", changed)["bad_samples"] == 1  # a copy of the same detector
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    for url, target, options, kind, reason in (
        (pairs, out, ("--regions", 3), ConfigError, "other --regions"),
        (pairs, out, ("--detector", changed), ConfigError, "made by another detector"),
        (pairs, make_pairs("other", [2]), (), ConfigError, "none of these shards with regions"),
        (pairs, os.path.relpath(pairs), (), ConfigError, "choose another folder than"),
        (pairs, damaged, (), DataError, "00001.tar.regions.json: not a record of a shard's regions"),
        (texts, tmp_path / "out2", (), DataError, "no sample has an image that the detector could read"),
        (cut, tmp_path / "out3", (), DataError, "00001.tar: the shard is truncated"),
    ):
        result = run_shards("regions", url, target, "--detector", detector, *options, fails=kind)
        assert reason in str(result.exception)
    assert not (tmp_path / "out3" / "00001.tar").exists()
