"""The multiway block: attention by its definition, routing of spans to experts, drop path, selected positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.models.multiway import Attention, MultiwayBlock

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


def test_attention_equals_its_definition_also_at_selected_queries(attention: Attention) -> None:
    x, bias, padding = torch.randn(ROWS, LENGTH, WIDTH), torch.randn(HEADS, LENGTH, LENGTH), torch.zeros(ROWS, LENGTH)
    padding[1, 3:] = torch.finfo(torch.float32).min / 2
    whole = attention(x, bias, padding, None)
    torch.testing.assert_close(whole, by_hand(attention, x, bias, padding), rtol=1e-4, atol=1e-5)
    read = torch.tensor([[0, 4], [2, 2], [1, 0]])
    expected = torch.stack([row[places] for row, places in zip(whole, read, strict=True)])
    torch.testing.assert_close(attention(x, bias, padding, read), expected, rtol=1e-4, atol=1e-5)
    padding[2] = torch.finfo(torch.float32).min / 2  # an example of only padding
    out = attention(x, bias, padding, None)
    out.sum().backward()
    assert out.isfinite().all()
    assert attention.weight.grad.isfinite().all()


# ---- the block


def block(layer_scale: float | None = 0.3, drop_path: float = 0.25) -> MultiwayBlock:
    module = MultiwayBlock(8, 2, 2, ("vision", "language", "vision_language"), layer_scale, drop_path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


def test_each_span_is_processed_by_its_expert_only() -> None:
    module, x = block(), torch.randn(2, 6, 8)
    split = module(x, {"language": slice(0, 2), "vision": slice(2, None)})
    for expert, span in (("language", slice(0, 2)), ("vision", slice(2, None))):
        torch.testing.assert_close(split[:, span], module(x, {expert: slice(None)})[:, span])
    module.zero_grad()
    split.sum().backward()
    idle = {name for name, parameter in module.named_parameters() if parameter.grad is None}
    assert idle == {name for name, _ in module.named_parameters() if "vision_language" in name}


def test_examples_drop_branches_independently() -> None:
    module, x = block(), torch.randn(4, 6, 8)
    keep = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    out = module(x, {"vision": slice(None)}, drop_path_mask=keep)
    attended = x + module.attention_gamma * module.attention(module.norm(x), None, None, None) / 0.75
    attended = torch.where(keep[:, :1, None], attended, x)
    fed = attended + module.expert_gamma * module.experts["vision"](attended) / 0.75
    torch.testing.assert_close(out, torch.where(keep[:, 1:, None], fed, attended))
    assert torch.equal(out[3], x[3])


def test_drop_path_needs_a_mask_and_at_rate_one_is_the_identity() -> None:
    x, route = torch.randn(2, 6, 8), {"vision": slice(None)}
    assert torch.equal(block(drop_path=0.25)(x, route), block(drop_path=0.0)(x, route))
    assert torch.equal(block(None, 1.0)(x, route, drop_path_mask=torch.zeros(2, 2, dtype=torch.bool)), x)


def test_selected_positions_equal_the_full_output() -> None:
    module, x = block(), torch.randn(2, 6, 8)
    bias, read = torch.randn(2, 6, 6), torch.tensor([[0, 3], [5, 1]])
    keep = torch.tensor([[True, False], [True, True]])
    whole = module(x, {"vision": slice(None)}, bias, None, keep)
    chosen = module(x, {"vision": slice(None)}, bias, None, keep, read)
    torch.testing.assert_close(chosen, torch.stack([whole[0, [0, 3]], whole[1, [5, 1]]]))
