"""Masked words are the same for every limit and batch, always [MASK], and never shown with an equal image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.config.schema import MaskingConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.masked_language import (
    mask_captions,
    masked_language,
    mismatched_images,
    predict_masked_tokens,
    words_of,
)
from pipeline.models.forward import ForwardInput
from pipeline.models.vlmo import VLMo


def test_masked_positions_are_mask_tokens_with_original_labels(held_out: EvalPairs, tokenizer: Tokenizer) -> None:
    masked = mask_captions(held_out, MaskingConfig(), tokenizer)
    for tokens, row, positions, labels in zip(
        held_out.tokens, masked.rows, masked.positions, masked.labels, strict=True
    ):
        assert positions
        assert {row[p] for p in positions} == {tokenizer.mask_id}
        restored = list(row)
        for position, label in zip(positions, labels, strict=True):
            restored[position] = label
        assert restored == list(tokens.ids)


def test_words_are_masked_whole(held_out: EvalPairs, tokenizer: Tokenizer) -> None:
    masked = mask_captions(held_out, MaskingConfig(), tokenizer)
    for caption, tokens in enumerate(held_out.tokens):
        for places in words_of(masked, caption, tokens.word_of):
            word = tokens.word_of[masked.positions[caption][places[0]]]
            assert len(places) == tokens.word_of.count(word)


def test_masks_do_not_depend_on_the_limit(held_out: EvalPairs, tokenizer: Tokenizer) -> None:
    few = replace(held_out, keys=held_out.keys[:3], captions=held_out.captions[:3], tokens=held_out.tokens[:6])
    few = replace(few, caption_of=held_out.caption_of[:6], image_id=held_out.image_id[:3], images=held_out.images[:3])
    whole, part = (mask_captions(each, MaskingConfig(), tokenizer) for each in (held_out, few))
    assert part.rows == whole.rows[:6]
    assert part.positions == whole.positions[:6]


@pytest.mark.parametrize(
    "ids", [[1, 2], [1, 1, 2, 2], [5, 4, 3, 2, 1], [1, 1, 2, 3, 4], [1, 1, 1, 2], [3, 1, 3, 2, 3, 9]]
)
def test_other_image_never_has_equal_content(ids: list[int]) -> None:
    image_id = torch.tensor(ids)
    other = mismatched_images(image_id)
    assert (image_id[other] != image_id).all()
    if 2 * max(ids.count(i) for i in ids) <= len(ids):
        assert sorted(other.tolist()) == list(range(len(ids)))


def test_one_image_alone_has_no_other() -> None:
    with pytest.raises(ValueError, match="no other image"):
        mismatched_images(torch.tensor([4, 4, 4]))


def test_guesses_equal_those_of_one_caption_at_a_time(model: VLMo, held_out: EvalPairs, tokenizer: Tokenizer) -> None:
    masked = mask_captions(held_out, MaskingConfig(), tokenizer)
    found = predict_masked_tokens(model, masked, tokenizer.pad_id, held_out.images, held_out.caption_of, batch=7)
    single = []
    for caption, row in enumerate(masked.rows):
        one = ForwardInput(
            heads=("mlm",),
            image=held_out.images[held_out.caption_of[caption]][None],
            text=torch.tensor([row]),
            text_keep=torch.ones(1, len(row), dtype=torch.bool),
            mask_positions=torch.tensor([masked.positions[caption]]),
        )
        with torch.no_grad():
            single.append(model.eval()({"x": one})["x"]["mlm"][0].softmax(-1))
    expected = torch.cat(single)
    truth = masked.truth()
    torch.testing.assert_close(found.truth_probability, expected[torch.arange(len(truth)), truth], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.probabilities, expected.topk(3).values, atol=1e-6, rtol=1e-4)
    assert found.accuracy == pytest.approx((found.tokens[:, 0] == truth).float().mean().item())


def test_stage_without_fusion_predicts_from_text_alone(model: VLMo, held_out: EvalPairs, tokenizer: Tokenizer) -> None:
    found = masked_language(model, held_out, MaskingConfig(), tokenizer, fused=False)
    assert found.own_image is None
    assert found.other_image is None
    assert 0.0 <= found.text_only.accuracy <= 1.0


def test_the_model_keeps_its_training_mode(model: VLMo, held_out: EvalPairs, tokenizer: Tokenizer) -> None:
    model.train()
    masked_language(model, held_out, MaskingConfig(), tokenizer, fused=True)
    assert model.training
    model.eval()
