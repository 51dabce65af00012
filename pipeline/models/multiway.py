"""Multiway (MoME) transformer block: one shared attention, one expert per modality (VLMo, section 3.1).

Shapes: B rows, L tokens (text first, then image), K positions whose result is wanted, D width, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.attention import Attention, gather

Expert = Literal["vision", "language", "vision_language"]
Route = dict[Expert, slice]

EPSILON = 1e-6  # of the encoder's LayerNorms


class FeedForward(nn.Module):
    """An expert: a feed-forward network with the norm before it."""

    def __init__(self, width: int, ratio: int, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.expand = nn.Linear(width, ratio * width)
        self.contract = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(self.norm(x))))


class MultiwayBlock(nn.Module):
    """Attention, its norm and the LayerScale gammas serve all modalities; the feed-forward part is routed."""

    attention_gamma: nn.Parameter | None
    expert_gamma: nn.Parameter | None

    def __init__(
        self,
        width: int,
        heads: int,
        ratio: int,
        experts: tuple[Expert, ...],
        layer_scale: float | None,
        drop_path: float,
        key_bias: bool = False,
        epsilon: float = EPSILON,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.attention = Attention(width, heads, key_bias)
        self.experts = nn.ModuleDict({name: FeedForward(width, ratio, epsilon) for name in experts})
        for name in ("attention_gamma", "expert_gamma"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
            self.register_parameter(name, gamma)

    def forward(
        self,
        x: Tensor,
        route: Route,
        bias: Tensor | None = None,
        padding: Tensor | None = None,
        drop_path_mask: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """`route` says which token span each expert reads; spans tile the sequence in order.

        bias (H, L, L) and padding (B, L) are added inside attention. drop_path_mask (B, 2) bool says which rows keep
        their attention and feed-forward branch; None keeps all, unscaled. With `read` (B, K) only those positions
        are computed: (B, K, D) instead of (B, L, D), for a last block whose other results nobody reads.
        """
        mixed = self.attention(self.norm(x), bias, padding, read)
        if read is not None:
            assert len(route) == 1, "positions can be chosen only where one expert reads the whole sequence"
            x = gather(x, read)
        attention_kept, expert_kept = self._kept(drop_path_mask, x.dtype)
        x = _add(x, mixed, self.attention_gamma, attention_kept)
        if len(route) == 1:
            (expert,) = route
            fed = self.experts[expert](x)
        else:
            fed = torch.cat([self.experts[expert](x[:, span]) for expert, span in route.items()], dim=1)
        return _add(x, fed, self.expert_gamma, expert_kept)

    def _kept(self, drop_path_mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The factors (B, 1, 1) of the two branches: 0 where dropped, 1 / (1 - rate) where kept."""
        if drop_path_mask is None:
            return None, None
        scale = 1.0 / (1.0 - self.drop_path) if self.drop_path < 1 else 0.0
        attention, expert = (drop_path_mask.to(dtype) * scale)[:, :, None, None].unbind(1)
        return attention, expert


def _add(x: Tensor, branch: Tensor, gamma: Tensor | None, kept: Tensor | None) -> Tensor:
    """x + gamma * kept * branch, in one reading of the branch."""
    if gamma is None:
        return x + branch if kept is None else torch.addcmul(x, branch, kept)
    return torch.addcmul(x, branch, gamma if kept is None else gamma * kept)
