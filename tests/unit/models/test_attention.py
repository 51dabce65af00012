"""Attention equals its definition, for all or selected queries and with padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.models.multiway import Attention

ROWS, LENGTH, WIDTH, HEADS = 3, 5, 8, 2


@pytest.fixture
def attention() -> Attention:
    generator = torch.Generator().manual_seed(0)
    module = Attention(WIDTH, HEADS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def by_hand(attention: Attention, x: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
    """Compute attention by its definition, one example and head at a time."""
    query, key, value = (x @ part.T for part in attention.weight.split(WIDTH))
    query, value = query + attention.query_bias, value + attention.value_bias
    mixed = torch.zeros_like(x)
    for row in range(ROWS):
        for head in range(HEADS):
            span = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            products = query[row, :, span] @ key[row, :, span].T / (WIDTH // HEADS) ** 0.5
            weights = (products + bias[head] + padding[row]).softmax(dim=-1)
            mixed[row, :, span] = weights @ value[row, :, span]
    return attention.projection(mixed)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(ROWS, LENGTH, WIDTH)
    bias = torch.randn(HEADS, LENGTH, LENGTH)
    padding = torch.zeros(ROWS, LENGTH)
    padding[1, 3:] = torch.finfo(torch.float32).min / 2
    return x, bias, padding


def test_attention_equals_its_definition(attention: Attention) -> None:
    x, bias, padding = inputs()
    expected = by_hand(attention, x, bias, padding)
    torch.testing.assert_close(attention(x, bias, padding, None), expected, rtol=1e-4, atol=1e-5)


def test_selected_queries_equal_those_of_the_full_output(attention: Attention) -> None:
    x, bias, padding = inputs()
    read = torch.tensor([[0, 4], [2, 2], [1, 0]])
    expected = torch.stack([row[places] for row, places in zip(attention(x, bias, padding, None), read, strict=True)])
    torch.testing.assert_close(attention(x, bias, padding, read), expected, rtol=1e-4, atol=1e-5)


def test_example_of_only_padding_gives_finite_values(attention: Attention) -> None:
    x, bias, padding = inputs()
    padding[2] = torch.finfo(torch.float32).min / 2
    out = attention(x, bias, padding, None)
    out.sum().backward()
    assert out.isfinite().all()
    assert attention.weight.grad.isfinite().all()
