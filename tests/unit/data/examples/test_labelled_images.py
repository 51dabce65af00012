"""Images with classes (`cls` members) and partly masked images, from tars to batches."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from pipeline.config.schema import RunConfig
from pipeline.data.contents.members import class_of
from pipeline.data.quarantine import BadSample
from pipeline.data.shards.check import check_shards
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from tests.support.data_stream import data_config, hash_of, open_loader, take

CLASSES = 4


@pytest.fixture
def folder(make_pairs, make_pair) -> str:
    """Return a folder of two tars with 18 images of class n % 4, three of which have a missing or bad class."""
    samples = {}
    for number in range(18):
        samples[divmod(number, 10)] = {"jpg": make_pair(number)["jpg"], "cls": f"{number % CLASSES}\n".encode()}
    del samples[0, 3]["cls"]
    samples[0, 7]["cls"], samples[1, 1]["cls"] = b"cat", b"4"
    made = make_pairs("labelled", [10, 8], samples)
    index_shards(Storage(), made)
    return made


def run_config(
    folder: str, source_type: str = "labelled", objective: str = "classification", **stage: Any
) -> RunConfig:
    vit = {"kind": "vit", "width": 16, "layers": 1, "heads": 2, "image_size": 32, "patch_size": 4}
    stage = {"global_batch_size": 9, "num_classes": CLASSES, **stage}
    return data_config({"one": folder}, (objective,), source_type, vit, {"streams": 3}, stage)


def test_images_have_their_class_and_bad_ones_are_replaced(folder: str) -> None:
    with open_loader(run_config(folder)) as loader:
        batches, bad = list(islice(loader.batches(0), 4)), loader.quarantined()
    labels = torch.cat([batch.label for batch in batches])
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(CLASSES))
    assert batches[0].image.shape == (9, 32, 32, 3)
    assert batches[0].text is None
    by_image = {}
    for label, image in zip(labels.tolist(), torch.cat([batch.image_id for batch in batches]).tolist(), strict=True):
        assert by_image.setdefault(image, label) == label
    reasons = {record["key"][-2:]: record["reason"] for record in bad}
    assert reasons.keys() == {"03", "07", "11"}
    assert "no class" in reasons["03"]
    assert "'cat'" in reasons["07"]
    assert "its class is 4; expected 0 to 3" in reasons["11"]


def test_shard_check_finds_the_bad_samples_of_training(folder: str) -> None:
    findings = [bad for report in check_shards(Storage(), folder, "labelled", 10**7, 1) for bad in report.bad]
    # The number of classes is known to the stage only.
    assert {(finding.key[-2:], finding.stage) for finding in findings} == {("03", "label"), ("07", "label")}


@pytest.mark.parametrize("text", [b"-1", b"1.5", b"", b"\xc2\xb2", b"1 2"])
def test_malformed_class_numbers_are_rejected(text: bytes) -> None:
    with pytest.raises(BadSample, match="label"):
        class_of({"cls": text})


MASKING = {"image_mask_ratio": 0.5, "patch_shape": "blocks", "mask_token_prob": 0.8, "random_patch_prob": 0.1}


def test_patch_replacements_do_not_depend_on_world_size(folder: str) -> None:
    config = run_config(folder, "images", "mim", masking=MASKING)
    plain = run_config(folder, "images", "mim", masking={"image_mask_ratio": 0.5})
    hashes = {hash_of(config, range(1, 4), world) for world in (1, 2, 4)}
    assert len(hashes) == 1
    assert hash_of(plain, range(1, 4)) not in hashes


def test_every_example_has_the_same_number_of_masked_patches(folder: str) -> None:
    batches = take(run_config(folder, "images", "mim", masking=MASKING), 20)
    positions = torch.cat([batch.patch_positions for batch in batches])
    shown = torch.cat([batch.patch_replacements for batch in batches])
    assert positions.shape == shown.shape == (180, 32)
    assert (shown == -1).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown == positions).float().mean().item() == pytest.approx(0.1, abs=0.02)
    (without,) = take(run_config(folder, "images", "mim"))
    assert without.patch_replacements is None
