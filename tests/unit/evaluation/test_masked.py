"""Masked words and patches depend on the sample alone, and predictions are those of one example at a time."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.config.schema import ImageDecoderConfig, MaskingConfig
from pipeline.evaluation import masked as evaluation
from pipeline.evaluation.retrieval import Predictor
from pipeline.models.forward import ForwardInput
from pipeline.objectives.mim import patch_targets, patchify


def test_whole_words_of_each_caption_are_masked_whatever_the_limit(held_out, tokenizer):
    masked = evaluation.mask_captions(held_out, MaskingConfig(), tokenizer)
    captions = zip(held_out.tokens, masked.rows, masked.positions, masked.labels, strict=True)
    for tokens, row, positions, labels in captions:
        assert {row[p] for p in positions} == {tokenizer.mask_id}
        original = dict(zip(positions, labels, strict=True))
        assert [original.get(p, token) for p, token in enumerate(row)] == list(tokens.ids)
        for word, places in evaluation.words_of(tokens.word_of[position] for position in positions).items():
            assert len(places) == tokens.word_of.count(word)
    few = replace(held_out, keys=held_out.keys[:3], captions=held_out.captions[:3], tokens=held_out.tokens[:6])
    part = evaluation.mask_captions(few, MaskingConfig(), tokenizer)
    assert (part.rows, part.positions) == (masked.rows[:6], masked.positions[:6])


def test_other_image_never_has_equal_content():
    for ids in ([1, 2], [1, 1, 2, 2], [5, 4, 3, 2, 1], [1, 1, 2, 3, 4], [1, 1, 1, 2], [3, 1, 3, 2, 3, 9]):
        image_id = torch.tensor(ids)
        other = evaluation.mismatched_images(image_id)
        assert (image_id[other] != image_id).all()
        if 2 * max(ids.count(i) for i in ids) <= len(ids):
            assert sorted(other.tolist()) == list(range(len(ids)))
    with pytest.raises(ValueError, match="no other image"):
        evaluation.mismatched_images(torch.tensor([4, 4, 4]))


def test_predictions_equal_those_of_one_caption_at_a_time(model, held_out, tokenizer):
    masked, predictor = evaluation.mask_captions(held_out, MaskingConfig(), tokenizer), Predictor(model, tokenizer, 7)
    batched = evaluation.predict_masked_tokens(predictor, masked, held_out, held_out.caption_of)
    single = []
    for row, positions, image in zip(masked.rows, masked.positions, held_out.caption_of, strict=True):
        text, mask = torch.tensor([row]), torch.tensor([positions])
        one = ForwardInput(heads=("mlm",), image=held_out.images[image][None], text=text, mask_positions=mask)
        with torch.no_grad():
            single.append(model.eval()({"x": one})["x"]["mlm"][0].softmax(-1))
    expected, truth = torch.cat(single), masked.truth()
    of_truth = expected.gather(1, truth[:, None])[:, 0]
    torch.testing.assert_close(batched.truth_probability, of_truth, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(batched.probabilities, expected.topk(3).values, atol=1e-6, rtol=1e-4)
    assert batched.accuracy == pytest.approx((batched.tokens[:, 0] == truth).float().mean().item())
    model.train()
    result = evaluation.masked_language(predictor, held_out, MaskingConfig(), fused=False)
    assert model.training, "the mode is kept"
    model.eval()
    assert list(result.predictions) == [evaluation.TEXT_ONLY]
    assert 0.0 <= result.predictions[evaluation.TEXT_ONLY].accuracy <= 1.0


class Knowing(nn.Module):
    """Model that predicts exactly the targets of the loss; `decoded`: reads only visible patches."""

    def __init__(self, target, decoded):
        super().__init__()
        self.target, self.decoded = target, decoded
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, forwards):
        (one,) = forwards.values()
        assert one.heads == (("decoded_image",) if self.decoded else ("mim",))
        if self.decoded:
            both = torch.cat([one.visible_patches, one.patch_positions], dim=1).sort(dim=1).values
            assert torch.equal(both, torch.arange(16).expand(len(both), -1))
        target = patch_targets(one.image, one.patch_positions, 8, self.target)
        return {"only": {"mim": target if self.target == "pixels" else nn.functional.one_hot(target, 512).float()}}


def test_only_masked_patches_change_follow_the_key_alone_and_true_predictions_restore_them(held_out, model, config):
    autoencoder = ImageDecoderConfig(layers=1, width=16, heads=1)
    predicted = [("pixels", None, 0.005), ("pixels", autoencoder, 0.005), ("mean_colour", None, 16.5 / 255)]
    for target, decoder, error in predicted:  # mean colours are predicted within half a class
        stage = config.stages[0].model_copy(update={"image_target": target, "image_decoder": decoder})
        result = evaluation.reconstruct_images(Knowing(target, decoder is not None), held_out, stage, config)
        assert result.error <= error
        assert result.error < result.error_without_model
        if target == "pixels":
            assert (result.filled.int() - held_out.images[:].int()).abs().max() <= 1
    for fraction in (0.25, 0.5):
        masking = config.stages[0].masking.model_copy(update={"image_mask_ratio": fraction})
        stage = config.stages[0].model_copy(update={"image_target": "pixels", "masking": masking})
        whole = evaluation.reconstruct_images(model, held_out, stage, config)
        before, masked, after = (patchify(image, 8) for image in (whole.original, whole.masked, whole.filled))
        is_masked = (masked == 128).all(dim=-1)
        assert (is_masked.sum(dim=1) == round(fraction * 16)).all()
        assert torch.equal(before[~is_masked], after[~is_masked])
        assert torch.equal(before[~is_masked], masked[~is_masked])
        few = replace(held_out, images=held_out.images[3:5], keys=held_out.keys[3:5])
        assert torch.equal(evaluation.reconstruct_images(model, few, stage, config).masked, whole.masked[3:5])
