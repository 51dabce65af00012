"""Images with classes (`cls` members) and partly masked images, from tars to batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.contents.members import class_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.loading.loader import Loader, fingerprint
from pipeline.data.quarantine import BadSample
from pipeline.data.shards.check import check_shards
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.objectives import batch_groups

CLASSES = 4


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a vision transformer reads no text"], 50)


def labelled(make_pair: Callable[[int], dict[str, bytes]], number: int, cls: bytes | None) -> dict[str, bytes]:
    picture = {"jpg": make_pair(number)["jpg"]}
    return picture if cls is None else picture | {"cls": cls}


@pytest.fixture
def folder(make_pairs: Callable[..., str], make_pair: Callable[[int], dict[str, bytes]]) -> str:
    """Return a folder of two tars with 18 images of class n % 4, three of which have a missing or bad class."""
    planted: dict[int, bytes | None] = {3: None, 7: b"cat", 11: b"4"}
    numbered = [(shard, sample, 10 * shard + sample) for shard, size in enumerate([10, 8]) for sample in range(size)]
    classes = {n: planted[n] if n in planted else f"{n % CLASSES}\n".encode() for *_, n in numbered}
    samples = {(shard, sample): labelled(make_pair, n, classes[n]) for shard, sample, n in numbered}
    made = make_pairs("labelled", [10, 8], samples)
    index_shards(Storage(), made)
    return made


def run_config(
    folder: str, source_type: str = "labelled", objective: str = "classification", **stage: Any
) -> RunConfig:
    values = {
        "name": "test",
        "model": {"kind": "vit", "width": 16, "layers": 1, "heads": 2, "image_size": 32, "patch_size": 4},
        "sources": {"one": {"shards": folder, "type": source_type}},
        "data": {"streams": 3, "max_bad_rate": 1.0},
        "stages": [
            {
                "name": "stage",
                "sources": {"one": 1.0},
                "objectives": {objective: {}},
                "steps": 50,
                "global_batch_size": 9,
                "num_classes": CLASSES,
                **stage,
            }
        ],
    }
    return validate(values, "test")


def take(config: RunConfig, tokenizer: Tokenizer, count: int) -> tuple[list[Batch], list[dict[str, Any]]]:
    with Loader(
        config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, rank=0, world_size=1
    ) as loader:
        return list(islice(loader.batches(0), count)), loader.quarantined()


def test_images_have_their_class_and_bad_ones_are_replaced(folder: str, tokenizer: Tokenizer) -> None:
    batches, bad = take(run_config(folder), tokenizer, 4)
    labels = torch.cat([batch.label for batch in batches])
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(CLASSES))
    assert batches[0].image.shape == (9, 32, 32, 3)
    assert batches[0].text is None
    by_picture = {}
    for label, image in zip(labels.tolist(), torch.cat([batch.image_id for batch in batches]).tolist(), strict=True):
        assert by_picture.setdefault(image, label) == label
    reasons = {record["key"][-2:]: record["reason"] for record in bad}
    assert reasons.keys() == {"03", "07", "11"}
    assert "no class" in reasons["03"]
    assert "'cat'" in reasons["07"]
    assert "its class is 4; expected 0 to 3" in reasons["11"]


def test_shard_check_finds_the_bad_samples_of_training(folder: str) -> None:
    findings = [bad for report in check_shards(Storage(), folder, "labelled", 10**7, 1) for bad in report.bad]
    assert {finding.key[-2:] for finding in findings} == {
        "03",
        "07",
    }  # the number of classes is known to the stage only
    assert {finding.stage for finding in findings} == {"label"}


@pytest.mark.parametrize("text", [b"-1", b"1.5", b"", b"\xc2\xb2", b"1 2"])
def test_malformed_class_numbers_are_rejected(text: bytes) -> None:
    with pytest.raises(BadSample, match="label"):
        class_of({"cls": text})
    assert class_of({"cls": b" 12\n"}) == 12


MASKING = {"image_mask_ratio": 0.5, "patch_shape": "blocks", "mask_token_prob": 0.8, "random_patch_prob": 0.1}


def test_patch_replacements_do_not_depend_on_world_size(folder: str, tokenizer: Tokenizer) -> None:
    config = run_config(folder, "images", "mim", masking=MASKING)
    prints = {
        fingerprint(
            config, config.stages[0], batch_groups(config, config.stages[0]), Storage(), tokenizer, range(1, 4), world
        )
        for world in (1, 2, 4)
    }
    assert len(prints) == 1
    plain = run_config(folder, "images", "mim", masking={"image_mask_ratio": 0.5})
    assert (
        fingerprint(plain, plain.stages[0], batch_groups(plain, plain.stages[0]), Storage(), tokenizer, range(1, 4), 1)
        not in prints
    )


def test_every_example_has_the_same_number_of_masked_patches(folder: str, tokenizer: Tokenizer) -> None:
    batches, _ = take(run_config(folder, "images", "mim", masking=MASKING), tokenizer, 20)
    positions = torch.cat([batch.patch_positions for batch in batches])
    shown = torch.cat([batch.patch_replacements for batch in batches])
    assert positions.shape == shown.shape == (180, 32)
    assert (shown == -1).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown == positions).float().mean().item() == pytest.approx(0.1, abs=0.02)
    without = take(run_config(folder, "images", "mim"), tokenizer, 1)[0][0]
    assert without.patch_replacements is None
