"""Relative positions: indices into the tables of images and texts, and the bias of fused sequences."""

from __future__ import annotations

import torch

from pipeline.models.embeddings import RelativePositions

GRID, TEXT, LAYERS, HEADS = 3, 6, 2, 2


def positions() -> RelativePositions:
    module = RelativePositions(LAYERS, HEADS, GRID, TEXT)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 1000 * parameter.numel())
    return module


def test_pairs_of_patches_with_equal_offset_share_a_row() -> None:
    index = RelativePositions(1, 1, GRID, 2).image_index
    assert index.shape == (10, 10)
    assert index[1, 2] == index[4, 5] == index[8, 9] != index[2, 1]
    assert index[1, 4] == index[6, 9]
    assert index[1:, 1:].unique().tolist() == list(range(25))


def test_pairs_of_words_with_equal_distance_share_a_row() -> None:
    index = RelativePositions(1, 1, 1, TEXT).text_index
    assert index[1, 3] == index[2, 4] == index[1, 2] + 1
    assert index[1:, 1:].unique().tolist() == list(range(9))


def test_cls_has_rows_of_its_own() -> None:
    for index, first in (
        (RelativePositions(1, 1, GRID, 2).image_index, 25),
        (RelativePositions(1, 1, 1, TEXT).text_index, 9),
    ):
        assert set(index[0, 1:].tolist()) == {first}
        assert set(index[1:, 0].tolist()) == {first + 1}
        assert index[0, 0] == first + 2


def test_longer_text_keeps_the_bias_of_the_shorter() -> None:
    module = positions()
    assert torch.equal(module(6, False)[:, :, :4, :4], module(4, False))
    long, short = module(6, True), module(4, True)
    kept = torch.tensor([0, 1, 2, 3, *range(6, 16)])
    assert torch.equal(long[:, :, kept][:, :, :, kept], short)


def test_fused_bias_has_one_value_per_cross_direction() -> None:
    module = positions()
    bias = module(4, True)
    assert bias.shape == (LAYERS, HEADS, 14, 14)
    assert torch.equal(bias[:, :, :4, :4], module(4, False))
    assert torch.equal(bias[:, :, 4:, 4:], module(0, True))
    to_image, to_text = module.cross.view(2, LAYERS, HEADS)
    assert (bias[:, :, :4, 4:] == to_image[:, :, None, None]).all()
    assert (bias[:, :, 4:, :4] == to_text[:, :, None, None]).all()


def test_columns_are_layers_then_heads() -> None:
    module = positions()
    assert torch.equal(module(1, False)[1, :, 0, 0], module.text[-1, HEADS:])
