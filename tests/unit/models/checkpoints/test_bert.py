"""BERT's published names become ImageBERT's and back, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ImageBERTConfig
from pipeline.models import build_model
from pipeline.models.checkpoints.bert import from_hugging_face, infer_section, to_hugging_face

CONFIG = ImageBERTConfig(width=128, layers=2, heads=2, max_text_length=12, region_features=8, region_classes=7)
VOCABULARY = 40


def published(kind: type) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=12,
    )  # fmt: skip
    return kind(config).state_dict()


def test_there_and_back_is_exact() -> None:
    state = published(BertForMaskedLM)
    back = to_hugging_face(from_hugging_face(state, CONFIG), CONFIG)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_back_and_there_is_exact() -> None:
    ours = build_model(CONFIG, VOCABULARY, seed=3).state_dict()
    again = from_hugging_face(to_hugging_face(ours, CONFIG), CONFIG)
    assert all(torch.equal(again[name], ours[name]) for name in again)
    assert {name.split(".")[0] for name in again} == {"text_embedding", "encoder", "mlm_head"}


@pytest.mark.parametrize("kind", [BertModel, BertForPreTraining])
def test_what_takes_no_part_is_dropped(kind: type) -> None:
    """The pooler and the next-sentence head are dropped."""
    found = from_hugging_face(published(kind), CONFIG)
    model = build_model(CONFIG, VOCABULARY)
    result = model.load_state_dict(found, strict=False)
    assert not result.unexpected_keys
    absent = {model.part_of(name) for name in result.missing_keys}
    assert absent <= set(model.HEAD_PARTS)
    assert ("mlm_head" in absent) == (kind is BertModel)


def test_a_file_without_the_tied_decoder_gives_the_words_embedding_twice() -> None:
    state = published(BertForMaskedLM)
    del state["cls.predictions.decoder.weight"], state["cls.predictions.decoder.bias"]
    found = from_hugging_face(state, CONFIG)
    words, decoder = found["text_embedding.word_embeddings.weight"], found["mlm_head.decode.weight"]
    assert torch.equal(words, decoder)
    assert words.data_ptr() != decoder.data_ptr()


def test_old_names_of_layer_norms_are_read() -> None:
    state = published(BertForMaskedLM)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    new, same = from_hugging_face(state, CONFIG), from_hugging_face(old, CONFIG)
    assert new.keys() == same.keys()


def test_positions_beyond_the_longest_text_are_cut() -> None:
    state = published(BertModel)
    found = from_hugging_face(state, CONFIG.model_copy(update={"max_text_length": 7}))
    positions = found["text_embedding.position_embeddings.weight"]
    assert torch.equal(positions, state["embeddings.position_embeddings.weight"][:7])


def test_a_text_that_bert_has_no_positions_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.max_text_length"):
        from_hugging_face(published(BertModel), CONFIG.model_copy(update={"max_text_length": 13}))


def test_a_checkpoint_of_another_model_is_refused_by_its_names() -> None:
    state = published(BertModel) | {"embeddings.other": torch.zeros(1)}
    del state["embeddings.LayerNorm.weight"]
    with pytest.raises(CheckpointError, match=r"missing: bert\.embeddings\.LayerNorm\.weight(.|\n)*embeddings\.other"):
        from_hugging_face(state, CONFIG)


def test_the_section_is_told_by_the_shapes() -> None:
    section = infer_section(published(BertModel), {"max_text_length": 12, "region_features": 8})
    assert ImageBERTConfig(**section) == ImageBERTConfig(
        width=128, layers=2, heads=2, mlp_ratio=4, max_text_length=12, region_features=8
    )


def test_what_is_no_bert_is_told() -> None:
    with pytest.raises(ConfigError, match="no BERT"):
        infer_section({"a": torch.zeros(1)}, {})
