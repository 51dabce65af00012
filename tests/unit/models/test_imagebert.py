"""ImageBERT embeds and reads regions as in the paper; without them it is BERT (checkpoints/test_hugging_face)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import ImageBERTConfig
from pipeline.models import build_model, skeleton
from pipeline.models.forward import ForwardInput, Regions
from pipeline.models.imagebert import ImageBERT
from tests.support.forwards import run

CONFIG = ImageBERTConfig(
    width=32, layers=2, heads=4, max_text_length=12, max_regions=6, region_features=8, region_classes=7, dropout=0.0
)
VOCABULARY = 40


@pytest.fixture(scope="module")
def model() -> ImageBERT:
    return build_model(CONFIG, VOCABULARY, seed=1)  # type: ignore[return-value]


@pytest.fixture
def regions() -> Regions:
    draw = torch.Generator().manual_seed(2)
    features, location = torch.randn(3, 5, 8, generator=draw), torch.rand(3, 5, 5, generator=draw)
    return Regions(features, location, torch.arange(5)[None] < torch.tensor([5, 4, 3])[:, None])


@pytest.fixture
def pair(regions: Regions) -> ForwardInput:
    text = torch.randint(5, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    keep = torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]
    return ForwardInput(("itm",), text=text, text_keep=keep, regions=regions)


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_region_embedding_is_the_sum_of_its_four_parts(model: ImageBERT, regions: Regions) -> None:
    part, words = model.region_embedding, model.text_embedding
    segment = words.token_type_embeddings.weight[1]
    feature = regions.features @ part.feature.weight.T + part.feature.bias
    location = regions.location @ part.location.weight.T + part.location.bias
    summed = feature + location + segment + part.position
    agree(part(regions, segment), F.layer_norm(summed, (32,), part.norm.weight, part.norm.bias, 1e-12))


def test_order_and_padding_of_regions_do_not_matter(model: ImageBERT, pair: ForwardInput, regions: Regions) -> None:
    turned = Regions(*(getattr(regions, name).flip(1) for name in ("features", "location", "keep")))
    noise = replace(regions, features=torch.where(regions.keep.unsqueeze(-1), regions.features, 99.0))
    for other in (turned, noise):
        agree(run(model, replace(pair, regions=other), "itm"), run(model, pair, "itm"))


def test_itm_cross_entropy_equals_binary_cross_entropy(model: ImageBERT, pair: ForwardInput) -> None:
    logits, matched = run(model, pair, "itm"), torch.tensor([1, 0, 1])
    assert torch.equal(logits[:, 0], torch.zeros(3))
    expected = F.binary_cross_entropy_with_logits(logits[:, 1], matched.float(), reduction="sum")
    agree(F.cross_entropy(logits, matched, reduction="sum"), expected)


def test_region_heads_predict_classes_and_features(model: ImageBERT, pair: ForwardInput) -> None:
    positions = torch.tensor([[0, 3], [2, -1], [1, -1]])
    out = run(model, replace(pair, heads=("moc", "mrfr", "tokens"), region_positions=positions))
    assert out["moc"].shape == (3, 2, 7)
    assert out["mrfr"].shape == (3, 2, 8)
    agree(out["moc"][0, 1], model.moc_head(out["tokens"][0, 9 + 3]))
    agree(out["mrfr"][1, 0], model.mrfr_head(out["tokens"][1, 9 + 2]))


def test_base_model_has_the_size_of_bert_base() -> None:
    """BERT-base's 110 M without pooler and 468 positions, plus the untied decoder and the region modules."""
    model = skeleton(ImageBERTConfig(), 30522)
    counts = dict.fromkeys(model.PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[model.part_of(name)] += parameter.numel()
    assert counts["encoder"] == 85_054_464
    assert counts["text_embedding"] == (30522 + 44 + 2 + 2) * 768
    assert counts["region_embedding"] == (2048 + 5 + 2 + 1 + 2) * 768
