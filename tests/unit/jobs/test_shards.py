"""`mome shards` reports what it imports and finds, prints foreign tars as clean text, and adds a detector's regions."""

import json
import os
import shlex
import tarfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from jobs.shards.detection import Detector, RegionActor
from pipeline.config.errors import ConfigError, DataError, MomeError
from pipeline.data.contents.regions import parse_regions
from pipeline.data.quarantine import BadSample
from pipeline.data.reading.samples import Sample, iter_samples
from pipeline.data.shards.tar import clean_name
from pipeline.data.storage import Storage
from tests.support.official_layouts import write_official_layouts
from tests.support.pairs import pair, tar_bytes, tar_of
from tests.support.shards_command import FEATURES, facts_of, refuses, run_shards, save_image, save_yolos, write_lines

build = partial(run_shards, "build")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write four images, one of them animated and all but the first with captions, and two other files."""
    folder = tmp_path / "data"
    for number, name in enumerate(("a.jpg", "b.png", "c.gif", "sub/d.jpg")):
        save_image(folder / name, number)
        if number:
            (folder / name).with_suffix(".txt").write_text(f"caption {number}")
    Image.new("RGB", (8, 6)).save(folder / "c.gif", save_all=True, append_images=[Image.new("RGB", (8, 6), "red")])
    for name in ("x.heic", "x.md"):
        write_lines(folder / name, "text")
    return folder


def lines(path: Path, *names: str) -> Path:
    return write_lines(path, *({"image": name, "caption": "a"} for name in names))


def test_imported_contents_are_counted_and_hints_name_the_option_to_try(images: Path, tmp_path: Path) -> None:
    result = build(images, tmp_path / "out")
    notes = " kB; 1 image without a caption; 1 animated image (first frame)"
    assert all(text in result.stdout for text in ("4 samples in 1 shard at", "4 images, 3 captions", notes))
    assert all(text in result.stderr for text in ("x.heic", "not read: 1 .md"))
    facts = facts_of("build", images, tmp_path / "out", "--overwrite")
    expected = {
        "images": 4,
        "captions": 3,
        "labels": 0,
        "without_caption": 1,
        "animated": 1,
        "left_out": 1,
        "skipped": {".md": 1},
    }
    assert facts | expected == facts
    absent = build(lines(tmp_path / "l.jsonl", "x.jpg", "y.jpg"), tmp_path / "none", fails=DataError)
    assert "hint: none of the listed images exists; give the folder" in absent.stderr
    assert absent.stderr.count("cannot be read") == 1, "one example is enough"
    half = build(lines(tmp_path / "l.jsonl", "x.jpg", "y.jpg", "a.jpg"), tmp_path / "half", "--images", images)
    assert "hint: more entries could not be used (2) than were imported (1)" in half.stderr
    for name in ("cat", "dog"):
        save_image(tmp_path / "classes" / name / "1.jpg")
    for folder, is_advised in ((tmp_path / "classes", True), (images, False)):
        assert ("--kind classes" in build(folder, tmp_path / "out", "--overwrite").stderr) == is_advised
    result = facts_of("build", tmp_path / "classes", tmp_path / "out", "--overwrite", "--kind", "classes")
    assert (result["num_samples"], result["classes.json"]) == (2, 2)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    write_lines(tmp_path / "tars" / "0.tar", "")
    refuses(DataError, "mome shards index", "build", tmp_path / "tars", tmp_path / "none")


def test_too_many_missing_entries_leave_nothing_and_options_reach_their_readers_only(images, tmp_path: Path) -> None:
    file, out = lines(tmp_path / "l.jsonl", "x.jpg", "a.jpg"), tmp_path / "out"
    for fraction in ("49%", "0"):
        arguments = (file, out, "--images", images, "--max-missing", fraction)
        refuses(DataError, r"1 of 2 entries could not be used \(50\.0%\)", "build", *arguments)
        assert not list(out.glob("*"))
    for fraction in ("50%", "0.5"):
        assert "1 left out" in build(file, out, "--images", images, "--max-missing", fraction, "--overwrite").stdout
    for fraction in ("word", "101%", "-1", "nan", "2", ""):
        reason = f"--max-missing {fraction}: expected a fraction"
        refuses(ConfigError, reason, "build", images, out, "--max-missing", fraction)
    (tmp_path / "t.csv").write_text("one,two\ndata/a.jpg,said\n")
    build(tmp_path / "t.csv", tmp_path / "out1", "--image-column", "one", "--caption-column", "2")
    file = lines(tmp_path / "lists" / "l.jsonl", "../data/a.jpg")
    assert "--allow-outside" in build(file, tmp_path / "out2", fails=DataError).stderr
    build(file, tmp_path / "out2", "--allow-outside")
    options = ("--split", "x"), ("--min-count", 2), ("--listed-only",), ("--image-column", "a"), ("--annotations", "x")
    for option in options:
        refuses(ConfigError, f"{option[0]} is for --kind .*read as folder", "build", images, tmp_path / "out3", *option)


DATASETS = Path(__file__).resolve().parents[3] / "pipeline" / "data" / "DATASETS.md"


def test_commands_of_the_data_sets_page_import_the_official_layouts(tmp_path: Path, monkeypatch: Any) -> None:
    write_official_layouts(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = DATASETS.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("mome shards ")]
    commands = [shlex.split(line, comments=True)[2:] for line in lines]
    results = {command[2]: facts_of(*command) for command in commands if command[0] == "build"}
    assert {name: (facts["kind"], facts["num_samples"], facts["captions"]) for name, facts in results.items()} == {
        "data/coco": ("karpathy", 2, 10), "data/coco_test": ("karpathy", 1, 5), "data/coco_val2017": ("coco", 1, 5),
        "data/flickr30k": ("karpathy", 1, 5), "data/flickr30k_test": ("karpathy", 1, 5),
        "data/visual_genome": ("vg_regions", 2, 4), "data/visual_genome_qa": ("vg_qa", 9, 0),
        "data/imagenet": ("classes", 2, 0), "data/imagenet_val": ("classes", 1, 0),
        "data/vqa_train": ("vqa", 9, 0), "data/vqa_val": ("vqa", 9, 0),
        **{f"data/nlvr2_{split}": ("nlvr2", 1, 0) for split in ("train", "dev", "test")},
        "data/hf_flickr_train": ("parquet", 1, 2), "data/hf_cifar": ("parquet", 2, 0),
        "data/hf_coco": ("parquet", 2, 4),
    }  # fmt: skip
    assert all(facts["left_out"] == 0 or "imagenet_val" in name for name, facts in results.items())
    indexed = [facts_of(*command)["num_samples"] for command in commands if command[0] == "index"]
    assert indexed == [2, 2]
    wrong = run_shards("check", "data/imagenet", "--workers", 1, status=3).stdout
    assert "hint: every sample fails; they can be read with --type labelled" in wrong
    assert max(map(len, run_shards("show", "data/visual_genome").stdout.splitlines())) <= 80
    shown = run_shards("show", "data/hf_cifar", "--sheet", "sheet.png").stdout
    assert "class 1: bird" in shown
    for name, kind in (("coco", "pairs"), ("cc3m", "pairs"), ("imagenet", "labelled"), ("hf_cifar", "labelled"),
                       ("vqa_train", "questions"), ("nlvr2_train", "statements")):  # fmt: skip
        run_shards("check", f"data/{name}", "--type", kind, "--workers", 1)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Pack a pair with a Latin-1 name, one whose caption ends in half an emoji, and a pair of symbolic links."""
    (tmp_path / "shards").mkdir()
    pairs = {"café": pair(0), "cut": pair(1) | {"json": b'{"caption": "a \\ud83d"}'}}
    files = [(f"{key}.{extension}", data) for key, members in pairs.items() for extension, data in members.items()]
    links = ((f"link.{extension}", b"", tarfile.SYMTYPE, "elsewhere") for extension in ("jpg", "json"))
    (tmp_path / "shards" / "0.tar").write_bytes(tar_of((*files, *links), encoding="latin-1"))
    return tmp_path / "shards"


def test_index_check_and_show_print_clean_text(foreign: Path, tmp_path: Path, caplog: Any) -> None:
    assert facts_of("index", foreign)["num_samples"] == 2
    assert "2 x symbolic link (the first: link.jpg)" in caplog.text
    facts = facts_of("check", foreign, "--workers", 1, "--report", tmp_path / "bad.jsonl", status=3)
    assert (facts["bad_samples"], facts["skipped"]) == (1, {"symbolic link": 2})
    bad = json.loads((tmp_path / "bad.jsonl").read_text(encoding="utf-8"))
    assert (bad["key"], "lone surrogate" in bad["reason"]) == ("cut", True)
    printed = run_shards("check", foreign, "--workers", 1, status=3).stdout
    assert "skipped, not part of a sample: symbolic link" in printed
    shown = facts_of("show", foreign, "--sheet", tmp_path / "sheet.png")["samples"]
    assert [sample["key"] for sample in shown] == [clean_name(b"caf\xe9"), "cut"]
    run_shards("show", foreign).stdout.encode()
    for path in (*foreign.glob("*.npz"), foreign / "manifest.json"):
        path.unlink()
    write_lines(foreign / "0_stats.json", {"count": 19, "successes": 2})
    assert "counted by another tool" in run_shards("index", foreign, "--trust-counts").stdout
    for arguments, is_indexed, trusted in (
        (("index", foreign, "--trust-counts"), False, 1),
        (("check", foreign, "--workers", 1), False, None),  # no command reads the tar for an index, or writes one
        (("show", foreign, "--samples", 1), True, None),
        (("index", foreign), True, 0),
    ):
        facts = facts_of(*arguments, status=3 if "check" in arguments else 0)
        assert (facts["num_samples"], bool([*foreign.glob("*.npz")]), facts.get("trusted")) == (2, is_indexed, trusted)


def test_output_replaces_only_an_older_output(foreign: Path, tmp_path: Path) -> None:
    run_shards("index", foreign)
    for command, options, option, status in (("check", ("--workers", 1), "--report", 3), ("show", (), "--sheet", 0)):
        place = tmp_path / command
        for _ in range(2):
            run_shards(command, foreign, *options, option, place, status=status)
        for other in (b"mine", b'{"image": "a.jpg"}\n', (foreign / "0.tar").read_bytes()):
            place.write_bytes(other)
            refuses(ConfigError, f"{option}.*did not write", command, foreign, *options, option, place)
            assert place.read_bytes() == other
        refuses(MomeError, "[Ff]older|[Dd]irectory", command, foreign, *options, option, foreign)


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
    is_ranked = (np.diff(record.confidences) <= 0).all()
    assert (len(record.features), record.image_size, is_ranked) == (queries, (40, 60), True)
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
def pairs(make_pairs, monkeypatch: pytest.MonkeyPatch) -> str:
    def in_this_process(arguments: tuple[Any, ...], shards: dict[str, Any], _: object) -> list[Any]:
        return [RegionActor(*arguments).detect(*shard) for shard in shards.items()]

    monkeypatch.setattr("jobs.shards.detection._on_actors", in_this_process)
    return make_pairs("pairs", [4, 3, 5], planted={(1, 2): pair(0) | {"jpg": BAD}})


def samples(folder: object) -> dict[str, Sample]:
    return {sample.key: sample for sample in iter_samples(Storage(), str(folder))}


def test_samples_keep_their_members_and_get_regions(pairs: str, detector: Path, tmp_path: Path, make_pairs) -> None:
    out, report = tmp_path / "out", tmp_path / "bad.jsonl"
    result = run_shards("regions", pairs, out, "--detector", detector, "--regions", 7, "--report", report, "--json")
    facts, finding = json.loads(result.stdout.splitlines()[-1]), json.loads(report.read_text())
    assert (facts["url"], facts["num_samples"], facts["shards"], facts["bad_samples"]) == (str(out), 12, 3, 1)
    assert facts["regions"] == 11 * 7
    assert (finding["key"], finding["shard"], finding["stage"]) == ("pairs00006", "00001.tar", "image")
    assert "pairs00006" in result.stderr
    run_shards("index", pairs)
    before, after = samples(pairs), samples(out)
    regions = {key: sample.members.pop("npz") for key, sample in after.items() if "npz" in sample.members}
    contents = ([(key, s.members, s.image_id) for key, s in side.items()] for side in (before, after))
    assert next(contents) == next(contents)
    assert before.keys() - regions.keys() == {"pairs00006"}
    for record in map(parse_regions, regions.values()):
        assert (record.features.shape, record.image_size) == ((7, FEATURES), (24, 24))
    old = {(0, 0): pair(1) | {"npz": b"old"}, (0, 1): pair(0) | {"jpg": BAD, "npz": b"old"}}  # replaced, or removed
    old = make_pairs("old", [2], planted=old)
    facts_of("regions", old, tmp_path / "replaced", "--detector", detector)
    intact, damaged = samples(tmp_path / "replaced").values()
    assert parse_regions(intact.members["npz"]).features.shape[1] == FEATURES
    assert "npz" not in damaged.members


def test_only_missing_and_replaced_shards_are_processed(pairs: str, detector: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = facts_of("regions", pairs, out, "--detector", detector)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    for name in ("00000.tar", "manifest.json"):  # the tar's record, which has the bad sample, was written before
        (out / name).unlink()
    assert facts_of("regions", pairs, out, "--detector", detector) == whole
    assert [path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != kept[path.name]] == ["00000.tar"]
    (Path(pairs) / "00002.tar").write_bytes(tar_bytes({"new": pair(99)}))
    assert facts_of("regions", pairs, out, "--detector", detector)["num_samples"] == 8
    assert "npz" in samples(out)["new"].members


def test_unusable_arguments_and_shards_are_rejected(pairs: str, detector: Path, tmp_path: Path, make_pairs) -> None:
    out = tmp_path / "out"
    refuses(ConfigError, "nothing is downloaded", "regions", pairs, out, "--detector", tmp_path / "none")
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
        refuses(kind, reason, "regions", url, target, "--detector", detector, *options)
    assert not (tmp_path / "out3" / "00001.tar").exists()
