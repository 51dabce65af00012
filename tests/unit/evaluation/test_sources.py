"""Held-out pairs are read completely in bounded memory, and embeddings equal those of one sample at a time."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.load import validate
from pipeline.config.schema import SourceConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_samples
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.evaluation import datasets
from pipeline.evaluation.datasets import load_pairs
from pipeline.evaluation.embedding import DONE, Embedder, embed_shards
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.masked import mask_captions, predict_masked_tokens
from pipeline.evaluation.ranks import SINGLE_PROCESS, Ranks
from pipeline.evaluation.report import build_report_data, render_report
from pipeline.evaluation.retrieval import Predictor
from pipeline.models import build_model
from pipeline.models.model import HeadConfig
from tests.support.ranks import run_ranks

IMAGES, CAPTIONS, SIDE, WIDTH = 5_000, 5, 384, 512


def test_pairs_are_read_in_the_order_of_the_manifest_up_to_a_limit(config, tokenizer, held_out, monkeypatch):
    assert held_out.keys == tuple(s.key for s in iter_samples(Storage(), config.sources["unseen"].shards))
    assert (held_out.images[:].shape, held_out.images[3].dtype) == ((24, 32, 32, 3), torch.uint8)
    assert held_out.caption_of.tolist() == [image for image in range(24) for _ in range(2)]
    texts = [text for own in held_out.captions for text in own]
    assert [tokens.ids for tokens in held_out.tokens] == [tokenizer.encode(text, 40).ids for text in texts]
    assert held_out.skipped == {}
    few = load_pairs(config, Storage(), "unseen", 5, tokenizer, max_text_length=40)
    assert (few.keys, few.image_id.tolist()) == (held_out.keys[:5], held_out.image_id[:5].tolist())
    assert torch.equal(few.images[:], held_out.images[:5])
    five_images = 5 * 3 * 32 * 32
    monkeypatch.setattr(datasets, "DECODED_BYTES", five_images)
    bounded = load_pairs(config, Storage(), "unseen", None, tokenizer, max_text_length=40)
    for numbers in (slice(None), slice(3, 9), torch.tensor([20, 2, 2, 7])):
        assert torch.equal(bounded.images[numbers], held_out.images[numbers])
    assert torch.equal(bounded.image(11), held_out.image(11))
    assert bounded.images._decoded.size <= five_images
    padded = [tensor.tolist() for tensor in datasets.pad_token_ids([[2, 5, 3], [2, 3]], pad=0)]
    assert padded == [[[2, 5, 3], [2, 3, 0]], [[True] * 3, [True, True, False]]]


def test_bad_samples_are_counted_and_too_many_and_unknown_sources_fatal(config, tmp_path, tokenizer):
    sources = {"images": config.sources["images"]}
    for source, num_bad in (("one", 1), ("five", 5)):
        samples = []
        for number in range(10):
            image = b"no image" if number < num_bad else simplejpeg.encode_jpeg(np.full((30, 20, 3), number, np.uint8))
            record = {"captions": ["a red square", "two circles"], "image_id": number // 2}
            samples.append({"__key__": f"{number:03d}", "jpg": image, "json": json.dumps(record).encode()})
        write_shards(Storage(), iter(samples), f"{tmp_path}/{source}", 4)
        sources[source] = SourceConfig(shards=f"{tmp_path}/{source}")
    run = config.model_copy(update={"sources": sources})
    pairs = load_pairs(run, Storage(), "one", None, tokenizer, max_text_length=40)
    assert (len(pairs), list(pairs.skipped.values())) == (9, [1])
    assert "image: " in next(iter(pairs.skipped))
    assert pairs.image_id[1] == pairs.image_id[2] != pairs.image_id[3]
    for source, error, message in (
        ("nowhere", ConfigError, "'nowhere' is not a source of this run; sources with pairs: one, five"),
        ("images", ConfigError, "'images' has no pairs"),
        ("five", DataError, r"5 of 10 samples are bad: image: .*max_bad_rate"),
    ):
        with pytest.raises(error, match=message):
            load_pairs(run, Storage(), source, None, tokenizer, max_text_length=40)


class Drawn(nn.Module):
    """Model that gives vectors of its width at no cost: an image's from its colours, a text's from its tokens."""

    def __init__(self):
        super().__init__()
        self.weight, generator = nn.Parameter(torch.zeros(1)), torch.Generator().manual_seed(0)
        self.colours, self.words = (torch.randn(count, WIDTH, generator=generator) for count in (3, 1000))

    def forward(self, forwards):
        (one,) = forwards.values()
        if one.image is not None:
            assert one.image.shape[1:] == (SIDE, SIDE, 3)
            return {"only": {"itc": F.normalize(one.image[:, 100, 100].float() @ self.colours, dim=1)}}
        return {"only": {"itc": F.normalize(self.words[one.text % 1000].sum(dim=1), dim=1)}}


def evaluate_coco_sized(config):
    tokenizer = Tokenizer.train(["picture told in words times 0123456789"] * 5, 200)
    result = evaluate(Drawn(), tokenizer, config, Storage()).to_json()
    return result["pairs"], result["captions"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
def test_5000_images_and_25000_captions_take_less_than_4_gib(config, tmp_path):
    """Measured in a separate process. The images alone would take 2.1 GiB, and each copy of the scores 0.5 GiB."""

    def samples():
        for number in range(IMAGES):
            colour = np.array([number % 251, number * 7 % 241, number * 13 % 239], dtype=np.uint8)
            captions = [f"picture {number} told in words {n} times" for n in range(CAPTIONS)]
            record = json.dumps({"captions": captions, "image_id": number}).encode()
            image = simplejpeg.encode_jpeg(np.full((SIDE, SIDE, 3), colour))
            yield {"__key__": f"{number:06d}", "jpg": image, "json": record}

    write_shards(Storage(), samples(), str(tmp_path), 1000)
    objectives = {"itc": config.stages[-1].objectives["itc"]}
    stage = config.stages[-1].model_copy(update={"objectives": objectives, "sources": {"coco": 1.0}})
    changes = {"sources": {"coco": SourceConfig(shards=str(tmp_path))}, "stages": (stage,)}
    changes["model"] = config.model.model_copy(update={"image_size": SIDE})
    changes["evaluation"] = config.evaluation.model_copy(update={"source": "coco", "batch_size": 64})
    ((pairs, captions, peak),) = run_ranks(evaluate_coco_sized, 1, config.model_copy(update=changes))
    assert (pairs, captions, peak < 4 * 2**30) == (IMAGES, IMAGES * CAPTIONS, True), peak


def test_the_canvas_around_images_of_own_shape_changes_no_result(make_pairs, make_pair):
    planted = {}
    for number, shape in enumerate([(24, 40), (40, 24), (24, 24), (20, 50), (33, 24), (24, 31)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8)
        planted[0, number] = make_pair(number) | {"jpg": simplejpeg.encode_jpeg(pixels, 90, "RGB", "444")}
    shards = make_pairs("shaped", [len(planted)], planted)
    index_shards(Storage(), shards)
    sizes = {"width": 32, "layers": 2, "heads": 2, "image_size": 24, "longest_side": 40, "patch_size": 8}
    plain = {"sources": {"pairs": 1.0}, "negatives": "random", "steps": 4, "global_batch_size": 4}
    stage = {"name": "pairs", "objectives": {"mlm": {}, "itm": {}, "mim": {}}, "max_text_length": 20, **plain}
    values = {
        "name": "shaped", "model": {"kind": "vilt", **sizes, "init_std": 0.3}, "data": {"streams": 2},
        "sources": {"pairs": {"shards": shards}}, "stages": [stage], "evaluation": {"source": "pairs", "batch_size": 5},
    }  # fmt: skip
    run = validate(values, "shaped")
    tokenizer = Tokenizer.train([f"picture {n} shows a thing in way {way}" for n in range(9) for way in "abc"], 99)
    model = build_model(run.model, tokenizer.size, HeadConfig("pixels", ranking=True), seed=3)
    held_out = load_pairs(run, Storage(), "pairs", None, tokenizer, 20)
    assert held_out.image_size.tolist() == [[24, 40], [40, 24], [24, 24], [16, 40], [32, 24], [24, 24]]
    assert (held_out.images[:].shape, held_out.image(3).shape) == ((6, 40, 40, 3), (16, 40, 3))

    larger = replace(held_out, images=F.pad(held_out.images[:], (0, 0, 0, 8, 0, 16), value=99))
    masked = mask_captions(held_out, run.stages[0].masking, tokenizer)
    pairs, predictor = torch.cartesian_prod(torch.arange(6), torch.arange(5)), Predictor(model, tokenizer, 7)
    results = []
    for part in (held_out, larger):
        words = predict_masked_tokens(predictor, masked, part, part.caption_of)
        scores = [predictor.fusion_scores(part, pairs, head) for head in ("itm", "ranking")]
        results.append((words.truth_probability, *scores))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0][1], results[0][2])

    result = evaluate(model, tokenizer, run, Storage(), stage="pairs")
    values = result.to_json()
    assert None not in (values["mlm"]["accuracy"], values["mlm"]["accuracy_text_only"], values["itm"]["accuracy"])
    assert (values["retrieval"]["by"], values["retrieval"]["images"], values["reconstruction"]) == ("itm", 6, None)
    assert "itm" in render_report(build_report_data(result, run, tokenizer), run, {})


@pytest.fixture(scope="module")
def shards(config, tmp_path_factory):
    """Pack the session's scenes into shards of seven."""
    folder = str(tmp_path_factory.mktemp("shards"))
    scenes = iter_samples(Storage(), config.sources["unseen"].shards)
    write_shards(Storage(), ({"__key__": sample.key, **sample.members} for sample in scenes), folder, 7)
    return folder


@pytest.fixture
def embed(model, config, tokenizer, shards, tmp_path):
    def embed(out, digest="weights-a", ranks=SINGLE_PROCESS, stage=-1, url=shards, storage=None):
        embedder = Embedder(Predictor(model, tokenizer), config, config.stages[stage], digest)
        return embed_shards(embedder, storage or Storage(), url, out if "://" in out else str(tmp_path / out), ranks)

    return embed


def tables(out):
    return {file.name: parquet.read_table(file) for file in sorted(out.glob("*.parquet"))}


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_every_image_and_caption_has_its_vector_also_in_a_bucket_which_no_other_source_replaces(
    embed, shards, tmp_path, model, held_out, tokenizer, make_pair, s3
):
    summary = embed("out")
    assert summary == {"shards": 4, "already_done": 0, "images": 24, "captions": 48, "skipped": 0}
    rows = [row for table in tables(tmp_path / "out").values() for row in table.to_pylist()]
    assert [row["key"] for row in rows] == [key for key in held_out.keys for _ in range(3)]
    assert [row["caption"] for row in rows] == [None, 0, 1] * 24
    assert [row["image_id"] for row in rows[::3]] == held_out.image_id.tolist()
    vectors = torch.tensor(np.array([row["vector"] for row in rows], dtype=np.float32)).view(24, 3, -1)
    predictor = Predictor(model, tokenizer)
    texts = predictor.embed_texts([tokens.ids for tokens in held_out.tokens])
    torch.testing.assert_close(vectors[:, 0], predictor.embed_images(held_out.images), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(vectors[:, 1:].flatten(0, 1), texts, atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="stage vision trained no contrast"):
        embed("out", stage=0)
    moved = shutil.copytree(shards, tmp_path / "moved")
    assert embed("out", url=str(moved))["already_done"] == 4
    write_shards(Storage(), iter([{"__key__": "a", **make_pair(1)}]), str(tmp_path / "other"), 1)
    before = tables(tmp_path / "out")
    for remedy in ("holds the vectors of", "another folder"):
        with pytest.raises(ConfigError, match=remedy):
            embed("out", url=str(tmp_path / "other"))
        (tmp_path / "out" / "_source.json").unlink(missing_ok=True)
    assert tables(tmp_path / "out") == before
    storage = Storage(s3.config)  # a bucket's embeddings equal a folder's
    for file in Path(shards).iterdir():
        storage.upload(file, s3.url("shards", file.name))
    summaries = [embed(s3.url("out"), url=s3.url("shards"), storage=storage) for _ in range(2)]
    assert [(summary["already_done"], summary["images"]) for summary in summaries] == [(0, 24), (4, 24)]
    for name, table in before.items():
        (tmp_path / name).write_bytes(storage.read(s3.url("out", name)))
        assert parquet.read_table(tmp_path / name) == table


def test_outdated_embeddings_are_computed_again_and_ranks_share_the_shards(embed, tmp_path):
    first, last = Ranks(), Ranks()
    first.world_size = last.world_size = 3
    last.rank = 2
    assert [embed("out")[key] for key in ("images", "already_done")] == [24, 4]
    assert [embed("three", ranks=rank)["images"] for rank in (first, last)] == [10, 7]
    assert embed("three")["already_done"] == 3
    out, rows = tmp_path / "out", tables(tmp_path / "out")
    assert tables(tmp_path / "three") == rows
    written, file = {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}, min(out.glob("*.parquet"))
    next((out / DONE).iterdir()).unlink()  # killed after a shard's file and before its record
    assert embed("out")["already_done"] == 3
    assert sum(file.stat().st_mtime_ns != time for file, time in written.items()) == 1, "a finished file was rewritten"
    assert tables(out) == rows
    file.unlink()
    assert embed("out")["already_done"] == 3
    record = next((out / DONE).iterdir())
    record.write_text(json.dumps({**json.loads(record.read_text()), "shard": "another"}))
    assert [embed("out", digest=digest)["already_done"] for digest in ("weights-a", "weights-b")] == [3, 0]
    assert parquet.read_schema(file).metadata[b"mome.checkpoint"] == b"weights-b"
