"""A ViLT on held-out images of different shapes: the canvas around an image changes no result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F

from pipeline.config.load import validate
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import load_pairs
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.masked import mask_captions, predict_masked_tokens
from pipeline.evaluation.report import build_report_data, render_report
from pipeline.evaluation.retrieval import fusion_scores
from pipeline.models import build_model
from pipeline.models.model import HeadConfig

SHAPES = [(24, 40), (40, 24), (24, 24), (20, 50), (33, 24), (24, 31)]


@pytest.fixture
def tokenizer():
    return Tokenizer.train([f"picture {number} shows a thing in way {way}" for number in range(9) for way in "abc"], 99)


@pytest.fixture
def run(make_pairs, make_pair):
    planted = {}
    for number, (height, width) in enumerate(SHAPES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        planted[0, number] = make_pair(number) | {"jpg": simplejpeg.encode_jpeg(pixels, 90, "RGB", "444")}
    shards = make_pairs("shaped", [len(SHAPES)], planted)
    index_shards(Storage(), shards)
    sizes = {"width": 32, "layers": 2, "heads": 2, "image_size": 24, "longest_side": 40, "patch_size": 8}
    stage = {
        "name": "pairs",
        "sources": {"pairs": 1.0},
        "objectives": {"mlm": {}, "itm": {}, "mim": {}},
        "negatives": "random",
        "steps": 4,
        "global_batch_size": 4,
        "max_text_length": 20,
    }
    values = {
        "name": "shaped",
        "model": {"kind": "vilt", **sizes, "init_std": 0.3},
        "sources": {"pairs": {"shards": shards}},
        "data": {"streams": 2},
        "stages": [stage, {**stage, "name": "ranked", "objectives": {"ranking": {}}}],
        "evaluation": {"source": "pairs", "batch_size": 5},
    }
    return validate(values, "shaped")


@pytest.fixture
def model(run, tokenizer):
    return build_model(run.model, tokenizer.size, HeadConfig("pixels", ranking=True), seed=3)


@pytest.fixture
def held_out(run, tokenizer):
    return load_pairs(run, Storage(), "pairs", None, tokenizer, 20)


def test_images_of_own_shape_share_one_canvas(held_out):
    assert held_out.image_size.tolist() == [[24, 40], [40, 24], [24, 24], [16, 40], [32, 24], [24, 24]]
    assert held_out.images[:].shape == (6, 40, 40, 3)
    assert held_out.image(3).shape == (16, 40, 3)


def test_the_canvas_changes_neither_guesses_nor_odds(model, run, held_out, tokenizer):
    larger = replace(held_out, images=F.pad(held_out.images[:], (0, 0, 0, 8, 0, 16), value=99))
    masked = mask_captions(held_out, run.stages[0].masking, tokenizer)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(5))
    results, pad = [], tokenizer.pad_id
    for part in (held_out, larger):
        words = predict_masked_tokens(model, masked, pad, part.images, part.caption_of, 4, part.image_size)
        itm, ranking = (
            fusion_scores(model, part.images, part.token_ids(), pad, pairs, 7, part.image_size, head)
            for head in ("itm", "ranking")
        )
        results.append((words.truth_probability, itm, ranking))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0][1], results[0][2])


def test_a_vilt_is_evaluated_and_reported(model, run, tokenizer):
    result = evaluate(model, tokenizer, run, Storage(), stage="pairs")
    values = result.to_json()
    assert None not in (values["mlm"]["accuracy"], values["mlm"]["accuracy_text_only"], values["itm"]["accuracy"])
    assert (values["retrieval"]["by"], values["retrieval"]["images"]) == ("itm", 6)
    assert values["reconstruction"] is None
    assert "itm" in render_report(build_report_data(result, run, tokenizer), run, {})
    ranked = evaluate(model, tokenizer, run, Storage(), stage="ranked")
    assert ranked.retrieval_by == "ranking"
    assert ranked.rankings.text_to_image.best.shape == (18, 6)
