"""BERT's published tensors are converted to ImageBERT's and back exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ImageBERTConfig
from pipeline.models import build_model
from pipeline.models.checkpoints import FORMATS

CONFIG = ImageBERTConfig(width=128, layers=2, heads=2, max_text_length=12, region_features=8, region_classes=7)
VOCABULARY = 40


def published(kind: type) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=12,
    )  # fmt: skip
    return kind(config).state_dict()


def test_round_trip_of_published_weights_is_exact() -> None:
    state = published(BertForMaskedLM)
    back = FORMATS["bert"].write(FORMATS["bert"].read(state, CONFIG), CONFIG)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", [BertModel, BertForPreTraining])
def test_unused_modules_are_dropped(kind: type) -> None:
    """The pooler and the next-sentence head have no counterpart."""
    found = FORMATS["bert"].read(published(kind), CONFIG)
    model = build_model(CONFIG, VOCABULARY)
    result = model.load_state_dict(found, strict=False)
    assert not result.unexpected_keys
    absent = {model.part_of(name) for name in result.missing_keys}
    assert absent <= set(model.HEAD_PARTS)
    assert ("mlm_head" in absent) == (kind is BertModel)


def test_missing_tied_decoder_is_a_copy_of_the_word_embedding() -> None:
    state = published(BertForMaskedLM)
    del state["cls.predictions.decoder.weight"], state["cls.predictions.decoder.bias"]
    found = FORMATS["bert"].read(state, CONFIG)
    words, decoder = found["text_embedding.word_embeddings.weight"], found["mlm_head.decode.weight"]
    assert torch.equal(words, decoder)
    assert words.data_ptr() != decoder.data_ptr()


def test_old_names_of_layer_norms_are_read() -> None:
    state = published(BertForMaskedLM)
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in state.items()
    }
    new, same = FORMATS["bert"].read(state, CONFIG), FORMATS["bert"].read(old, CONFIG)
    assert new.keys() == same.keys()


def test_positions_beyond_the_longest_text_are_cut() -> None:
    state = published(BertModel)
    found = FORMATS["bert"].read(state, CONFIG.model_copy(update={"max_text_length": 7}))
    positions = found["text_embedding.position_embeddings.weight"]
    assert torch.equal(positions, state["embeddings.position_embeddings.weight"][:7])


def test_max_text_length_beyond_the_positions_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"model\.max_text_length"):
        FORMATS["bert"].read(published(BertModel), CONFIG.model_copy(update={"max_text_length": 13}))


def test_checkpoint_of_another_model_is_rejected_by_its_names() -> None:
    state = published(BertModel) | {"embeddings.other": torch.zeros(1)}
    del state["embeddings.LayerNorm.weight"]
    with pytest.raises(CheckpointError, match=r"missing: bert\.embeddings\.LayerNorm\.weight(.|\n)*embeddings\.other"):
        FORMATS["bert"].read(state, CONFIG)
