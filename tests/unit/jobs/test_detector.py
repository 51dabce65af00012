"""Detector outputs become regions by the same rule for every model family, tested on tiny random detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorPil,
)

from jobs.shards.detector import Detector, detector_digest
from pipeline.config.errors import ConfigError
from pipeline.data.contents.regions import parse_regions
from pipeline.data.quarantine import BadSample

QUERIES = 9
SIDES = {"shortest_edge": 32, "longest_edge": 48}
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_TRANSFORMER = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": QUERIES, "num_labels": 5,
}  # fmt: skip


_BACKBONE = ResNetConfig(**_STAGES, out_features=["stage4"])
_RT_BACKBONE = RTDetrResNetConfig(**_STAGES, out_features=["stage2", "stage3", "stage4"])
_RT_SIZES = {"encoder_in_channels": [8, 8, 16], "encoder_hidden_dim": 16, "decoder_in_channels": [16, 16, 16]}
_YOLOS = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": [32, 48], "patch_size": 8, "num_detection_tokens": QUERIES, "num_labels": 5,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any, Any]] = {  # model, its config, processor
    "detr": (  # a decoder with a class for "nothing"
        DetrForObjectDetection,
        DetrConfig(backbone_config=_BACKBONE, use_timm_backbone=False, backbone=None, **_TRANSFORMER),
        DetrImageProcessorPil(size=SIDES),
    ),
    "rt_detr": (  # a decoder with a sigmoid for each class
        RTDetrForObjectDetection,
        RTDetrConfig(backbone_config=_RT_BACKBONE, **_RT_SIZES, **_TRANSFORMER),
        RTDetrImageProcessorPil(size={"height": 64, "width": 64}),
    ),
    # an encoder with detection tokens after those of the patches
    "yolos": (YolosForObjectDetection, YolosConfig(**_YOLOS), YolosImageProcessorPil(size=SIDES)),
}


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


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_region_has_its_query_vector_box_and_class(tmp_path: Path, family: str, picture: np.ndarray) -> None:
    """The reference is transformers' own post-processing, which discards the query vectors."""
    detector = Detector(save(family, tmp_path), torch.device("cpu"))
    record = detector(picture, 100)
    with torch.inference_mode():
        output = detector._model(**detector._prepare(images=picture, return_tensors="pt"))
    expected = detector._prepare.post_process_object_detection(output, threshold=0.0, target_sizes=[(40, 60)])[0]
    order = torch.argsort(expected["scores"], descending=True, stable=True)
    # With a no-object class each query occurs once; otherwise (query, class) pairs, of which ours is the first.
    has_nothing = family in ("detr", "yolos")
    order = order if has_nothing else order[:1]
    for name, ours in (("scores", record.confidences), ("labels", record.classes)):
        np.testing.assert_allclose(ours[: len(order)], expected[name][order], atol=1e-6)
    boxes = expected["boxes"][order].numpy().clip(0, [60, 40, 60, 40])
    np.testing.assert_allclose(record.boxes[: len(order)], boxes, atol=1e-3)
    assert (len(record), record.image_size) == (QUERIES, (40, 60))
    assert (np.diff(record.confidences) <= 0).all()
    hidden = output.last_hidden_state[0, -QUERIES:].numpy()
    query = [int(np.abs(hidden - vector).sum(axis=1).argmin()) for vector in record.features]
    assert sorted(query) == list(range(QUERIES))
    logits = output.logits[0, :, :-1] if has_nothing else output.logits[0]
    assert record.classes.tolist() == logits.argmax(dim=1)[query].tolist()
    few, whole = (parse_regions(detector(picture, count).to_bytes()) for count in (4, 9))
    for name in ("features", "boxes", "classes", "confidences"):  # the most confident are kept
        assert np.array_equal(getattr(few, name), getattr(whole, name)[:4])
    assert int(whole.classes.max()) < 5


def test_digest_depends_on_the_detector_files(tmp_path: Path) -> None:
    one, other = save("yolos", tmp_path / "one"), save("yolos", tmp_path / "other")
    assert detector_digest(one) == detector_digest(other)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert detector_digest(one) != detector_digest(other)


def test_missing_detectors_and_refused_images_are_named(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no such folder.*nothing is downloaded"):
        Detector(tmp_path / "facebook/detr-resnet-50", torch.device("cpu"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no detector that transformers can load"):
        Detector(tmp_path, torch.device("cpu"))
    detector = Detector(save("yolos", tmp_path / "yolos"), torch.device("cpu"))
    monkeypatch.setattr(detector, "_prepare", Mock(side_effect=ValueError("too thin")))
    with pytest.raises(BadSample, match="too thin"):
        detector(picture, 10)
