"""ImageBERT equals BERT on text alone, and embeds and reads regions as in the paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel

from pipeline.config.schema import ImageBERTConfig
from pipeline.models import build_model, skeleton
from pipeline.models.checkpoints import FORMATS
from pipeline.models.forward import ForwardInput, Regions
from pipeline.models.imagebert import ImageBERT

CONFIG = ImageBERTConfig(
    width=32, layers=2, heads=4, max_text_length=12, max_regions=6, region_features=8, region_classes=7, dropout=0.0
)
VOCABULARY = 40


@pytest.fixture(scope="module")
def model() -> ImageBERT:
    return build_model(CONFIG, VOCABULARY, seed=1)  # type: ignore[return-value]


@pytest.fixture
def text() -> Tensor:
    return torch.randint(5, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def keep() -> Tensor:
    return torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]


def regions_of(rows: int, count: int, seed: int = 2) -> Regions:
    draw = torch.Generator().manual_seed(seed)
    kept = torch.arange(count)[None] < torch.tensor([count, count - 1, count - 2] * rows)[:rows, None]
    return Regions(
        features=torch.randn(rows, count, 8, generator=draw),
        location=torch.rand(rows, count, 5, generator=draw),
        keep=kept,
    )


@pytest.fixture
def regions() -> Regions:
    return regions_of(3, 5)


def agree(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def hugging_face(kind: type) -> torch.nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=12, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return kind(config).eval()


def test_without_regions_it_equals_bert(text: Tensor, keep: Tensor) -> None:
    bert = hugging_face(BertModel)
    ours = ImageBERT(CONFIG, VOCABULARY)
    ours.load_state_dict(FORMATS["bert"].read(bert.state_dict(), CONFIG), strict=False)
    with torch.no_grad():
        found = ours({"text": ForwardInput(heads=("tokens",), text=text, text_keep=keep)})["text"]["tokens"]
        expected = bert(input_ids=text, attention_mask=keep.long()).last_hidden_state
    agree(found[keep], expected[keep])


def test_mlm_without_regions_equals_bert(text: Tensor, keep: Tensor) -> None:
    bert = hugging_face(BertForMaskedLM)
    ours = ImageBERT(CONFIG, VOCABULARY)
    ours.load_state_dict(FORMATS["bert"].read(bert.state_dict(), CONFIG), strict=False)
    everywhere = torch.arange(9).expand_as(text)
    asked = ForwardInput(heads=("mlm",), text=text, text_keep=keep, mask_positions=everywhere)
    found = ours({"text": asked})["text"]["mlm"]
    expected = bert(input_ids=text, attention_mask=keep.long()).logits
    agree(found[keep], expected[keep])
    for logits in (found, expected):
        F.cross_entropy(logits[keep], text[keep]).backward()
    query, expected_query = (m.encoder.layer[0].attention.self.query.weight.grad for m in (ours, bert.bert))
    assert (query - expected_query).norm() <= 1e-5 * expected_query.norm()


def test_region_embedding_is_the_sum_of_its_four_parts(model: ImageBERT, regions: Regions) -> None:
    part, words = model.region_embedding, model.text_embedding
    segment = words.token_type_embeddings.weight[1]
    expected = F.layer_norm(
        regions.features @ part.feature.weight.T + part.feature.bias
        + regions.location @ part.location.weight.T + part.location.bias
        + segment + part.position,
        (32,), part.norm.weight, part.norm.bias, 1e-12,
    )  # fmt: skip
    agree(part(regions, segment), expected)


def test_order_of_regions_does_not_matter(model: ImageBERT, text: Tensor, keep: Tensor, regions: Regions) -> None:
    turned = Regions(*(getattr(regions, name).flip(1) for name in ("features", "location", "keep")))
    asked = ForwardInput(heads=("itm",), text=text, text_keep=keep, regions=regions)
    out = model({"one": asked, "other": replace(asked, regions=turned)})
    agree(out["one"]["itm"], out["other"]["itm"])


def test_features_of_padding_regions_reach_no_output(
    model: ImageBERT, text: Tensor, keep: Tensor, regions: Regions
) -> None:
    noise = Regions(torch.where(regions.keep.unsqueeze(-1), regions.features, 99.0), regions.location, regions.keep)
    asked = ForwardInput(heads=("itm",), text=text, text_keep=keep, regions=regions)
    agree(model({"one": asked})["one"]["itm"], model({"one": replace(asked, regions=noise)})["one"]["itm"])


def test_itm_cross_entropy_equals_binary_cross_entropy(
    model: ImageBERT, text: Tensor, keep: Tensor, regions: Regions
) -> None:
    logits = model({"one": ForwardInput(heads=("itm",), text=text, text_keep=keep, regions=regions)})["one"]["itm"]
    matched = torch.tensor([1, 0, 1])
    assert torch.equal(logits[:, 0], torch.zeros(3))
    expected = F.binary_cross_entropy_with_logits(logits[:, 1], matched.float(), reduction="sum")
    agree(F.cross_entropy(logits, matched, reduction="sum"), expected)


def test_region_heads_predict_classes_and_features(
    model: ImageBERT, text: Tensor, keep: Tensor, regions: Regions
) -> None:
    positions = torch.tensor([[0, 3], [2, -1], [1, -1]])
    asked = ForwardInput(
        heads=("moc", "mrfr", "tokens"), text=text, text_keep=keep, regions=regions,
        region_positions=positions,
    )  # fmt: skip
    out = model({"one": asked})["one"]
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
