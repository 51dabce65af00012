"""Self-attention: BEiT's form, which all modalities of VLMo share, has query and value biases and no key bias.

A key bias adds the same to every product of a query and so changes nothing; ViT's published weights have one.

Shapes: B rows, L tokens, K positions whose result is wanted, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def gather(x: Tensor, positions: Tensor) -> Tensor:
    """The vectors of `x` (B, L, D) at `positions` (B, K) of each row: (B, K, D)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def gather_bias(bias: Tensor, positions: Tensor) -> Tensor:
    """The rows of a bias (1 or B, H, L, L) that the queries at `positions` (B, K) read: (B, H, K, L)."""
    if len(bias) != 1:
        return bias.gather(2, positions[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3]))
    # An embedding look-up, because its backward neither sorts nor serialises as that of plain indexing does.
    picked = F.embedding(positions, rearrange(bias, "1 h q k -> q (h k)"))
    return rearrange(picked, "b q (h k) -> b h q k", h=bias.shape[1])


def gather_pairs(bias: Tensor, positions: Tensor) -> Tensor:
    """The bias (H, L, L) among the tokens at `positions` (B, K) of each row: (B, H, K, K)."""
    queries = gather_bias(bias.unsqueeze(0), positions)
    return queries.gather(3, positions[:, None, None, :].expand(*queries.shape[:3], -1))


class Attention(nn.Module):
    key_bias: nn.Parameter | None

    def __init__(self, width: int, heads: int, key_bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        # Owned here and not by three Linears: ZeRO-3 gathers a parameter only for the module that owns it.
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.register_parameter("key_bias", nn.Parameter(torch.zeros(width)) if key_bias else None)
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None, padding: Tensor | None, read: Tensor | None) -> Tensor:
        """Mix the tokens of each row; the result is (B, L, D), or (B, K, D) where `read` (B, K) chooses queries.

        bias (H, L, L), or one of each row's own (B, H, L, L), and padding (B, L) are added to the scaled products of
        queries and keys.
        """
        query, key, value = self._project(x, read)
        if bias is not None:
            bias = bias if bias.dim() == 4 else bias.unsqueeze(0)
            bias = bias if read is None else gather_bias(bias, read)
        if padding is not None:
            padding = padding[:, None, None, :]
            bias = padding if bias is None else bias + padding
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        if bias is not None and not len(x):
            # For no rows the kernel forgets the bias; every rank must run the same graph, also one without rows.
            mixed = mixed + 0 * bias.sum()
        return self.projection(rearrange(mixed, "b h l d -> b l (h d)"))

    def _project(self, x: Tensor, read: Tensor | None) -> tuple[Tensor, ...]:
        key_bias = torch.zeros_like(self.query_bias) if self.key_bias is None else self.key_bias
        if read is None:
            joint = F.linear(x, self.weight, torch.cat([self.query_bias, key_bias, self.value_bias]))
            return rearrange(joint, "b l (three h d) -> three b h l d", three=3, h=self.heads).unbind(0)
        width = x.shape[-1]
        query = F.linear(gather(x, read), self.weight[:width], self.query_bias)
        joint = F.linear(x, self.weight[width:], torch.cat([key_bias, self.value_bias]))
        key, value = rearrange(joint, "b l (two h d) -> two b h l d", two=2, h=self.heads).unbind(0)
        return rearrange(query, "b l (h d) -> b h l d", h=self.heads), key, value
