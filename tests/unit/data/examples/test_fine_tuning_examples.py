"""Examples of questions, statements and classes, and of partly masked images, from tars to batches."""

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.schema import RunConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions, iter_samples
from pipeline.data.shards.check import check_shards, sample_defect
from pipeline.data.shards.manifest import index_shards
from pipeline.data.shards.tar import TarSample
from pipeline.data.storage import Storage
from tests.support.data_stream import data_config, hash_of, open_loader, take
from tests.support.fine_tuning_data import COLOURS, image_of_sides, run_config

OBJECTIVES = {"questions": "vqa", "statements": "nlvr2", "labelled": "classification"}
KEYS: dict[str, dict[str, int]] = {"questions": {"num_answers": 6}, "labelled": {"num_classes": 4}}
CLASSES = 4
MASKING = {"image_mask_ratio": 0.5, "patch_shape": "blocks", "mask_token_prob": 0.8, "random_patch_prob": 0.1}


def drawn_config(folder: Path, source_type: str) -> RunConfig:
    return run_config(folder, source_type, OBJECTIVES[source_type], 1, **KEYS.get(source_type, {}))


@pytest.mark.parametrize(("source_type", "other"), [*pairwise(OBJECTIVES), ("labelled", "questions")])
def test_examples_hold_what_the_objective_reads_on_any_number_of_ranks(
    tmp_path: Path, source_type: str, other: str
) -> None:
    config = drawn_config(tmp_path, source_type)
    for sample in list(iter_samples(Storage(), config.sources["test"].shards))[:3]:  # the shard check agrees
        walked = TarSample(sample.key, False, sample.members)
        assert sample_defect(source_type, 10**6, None, walked) is None  # type: ignore[arg-type]
        assert sample_defect(other, 10**6, None, walked) is not None  # type: ignore[arg-type]
    tokenizer = Tokenizer.train([*iter_captions(Storage(), config.sources["train"].shards), "x"], 200)
    (batch,) = take(config, tokenizer=tokenizer)
    parts = [take(config, tokenizer=tokenizer, rank=rank, world_size=3)[0] for rank in range(3)]
    for name in ("image", "second_image", "label", "answers", "answer_scores"):
        if (expected := getattr(batch, name)) is not None:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), expected), name
    if source_type == "questions":
        assert batch.label is batch.second_image is None
        listed = batch.answers >= 0
        assert listed.sum(dim=1).tolist() == [1] * 32  # "dark red" and its like are not listed
        assert batch.answers[listed].max() < len(COLOURS)
        assert batch.answer_scores[listed].tolist() == [1.0] * 32
        assert batch.answer_scores[~listed].tolist() == [0.0] * (32 * 9)
    if source_type == "statements":
        assert batch.image.shape == batch.second_image.shape == (32, 32, 32, 3)
        assert set(batch.label.tolist()) == {0, 1}
        # One image has red shapes, the other blue ones.
        redness = torch.stack([batch.image, batch.second_image]).float().mean(dim=(2, 3)) @ torch.tensor([1.0, 0, -1])
        assert (redness[0] != redness[1]).all()


def test_another_list_of_answers_changes_the_digest(tmp_path: Path) -> None:
    config, digests = drawn_config(tmp_path, "questions"), set()
    (tmp_path / "other.json").write_text(json.dumps(["no", *COLOURS, "yes"]))
    other = config.stages[0].model_copy(update={"answer_list": str(tmp_path / "other.json")})
    for stage in (config.stages[0], other):
        with open_loader(config.model_copy(update={"stages": (stage,)})) as loader:
            digests.add(loader.digest)
    assert len(digests) == 2


def test_images_are_not_mirrored_if_an_answer_names_a_side(tmp_path: Path) -> None:
    """The question does not name a side: 'which side is it on?' alone would allow mirroring."""
    config = drawn_config(tmp_path, "questions")
    stage = config.stages[0].model_copy(update={"answer_list": f"{tmp_path}/questions-0/answers.json"})
    for answer, is_flipped in (("up", True), ("left", False)):
        record = json.dumps({"question": "where is it?", "answers": {answer: 1.0}}).encode()
        samples = [{"__key__": f"s{number}", "jpg": image_of_sides(), "json": record} for number in range(32)]
        write_shards(Storage(), samples, str(tmp_path / answer))
        train = config.sources["train"].model_copy(update={"shards": str(tmp_path / answer)})
        (batch,) = take(config.model_copy(update={"sources": {"train": train}, "stages": (stage,)}))
        left, right = (half.float().mean(dim=(1, 2, 3)) for half in (batch.image[:, :, :8], batch.image[:, :, -8:]))
        assert bool((left < right).all()) is not is_flipped


@pytest.fixture
def folder(make_pairs, make_pair) -> str:
    """Return a folder of two tars with 18 images of class n % 4, three of which have a missing or bad class."""
    samples = {}
    for number in range(18):
        samples[divmod(number, 10)] = {"jpg": make_pair(number)["jpg"], "cls": f"{number % CLASSES}\n".encode()}
    del samples[0, 3]["cls"]
    samples[0, 7]["cls"], samples[1, 1]["cls"] = b"cat", b"4"
    folder = make_pairs("labelled", [10, 8], samples)
    index_shards(Storage(), folder)
    return folder


def vit_config(folder: str, source_type: str, objective: str, **stage: Any) -> RunConfig:
    vit = {"kind": "vit", "width": 16, "layers": 1, "heads": 2, "image_size": 32, "patch_size": 4}
    stage = {"global_batch_size": 9, "num_classes": CLASSES, **stage}
    return data_config({"one": folder}, (objective,), source_type, vit, {"streams": 3}, stage)


def test_images_have_their_class_and_bad_ones_are_replaced(folder: str) -> None:
    with open_loader(vit_config(folder, "labelled", "classification")) as loader:
        batches, bad = list(islice(loader.batches(0), 4)), loader.quarantined()
    labels, images = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("label", "image_id"))
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(CLASSES))
    assert batches[0].image.shape == (9, 32, 32, 3)
    assert batches[0].text is None
    assert len(set(zip(labels.tolist(), images.tolist(), strict=True))) == len(set(images.tolist()))
    reasons = {record["key"][-2:]: record["reason"] for record in bad}
    expected = {"03": "no class", "07": "'cat'", "11": "its class is 4; expected 0 to 3"}
    assert reasons.keys() == expected.keys()
    assert all(reason in reasons[key] for key, reason in expected.items())
    findings = [bad for report in check_shards(Storage(), folder, "labelled", 10**7, 1) for bad in report.bad]
    # The number of classes is known to the stage only.
    assert {(finding.key[-2:], finding.stage) for finding in findings} == {("03", "label"), ("07", "label")}


def test_every_example_has_the_same_number_of_masked_patches_on_any_number_of_ranks(folder: str) -> None:
    config, plain = (vit_config(folder, "images", "mim", **masking) for masking in ({"masking": MASKING}, {}))
    hashes = {hash_of(config, range(1, 4), world) for world in (1, 2, 4)}
    assert len(hashes) == 1
    assert hash_of(plain, range(1, 4)) not in hashes
    batches = take(config, 20)
    positions = torch.cat([batch.patch_positions for batch in batches])
    shown = torch.cat([batch.patch_replacements for batch in batches])
    assert positions.shape == shown.shape == (180, 32)
    assert (shown == -1).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (shown == positions).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert take(plain)[0].patch_replacements is None
