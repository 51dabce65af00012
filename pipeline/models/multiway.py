"""Multiway (MoME) transformer block: self-attention, and one feed-forward expert per modality (VLMo, section 3.1).

VLMo shares attention between the modalities; BEiT-3 routes it, too, and normalises in front of output projections.

Attention follows BEiT: query and value biases, no key bias. A key bias adds the same to every product of a query and so
changes nothing, but ViT's published weights have one; routed attention needs one, because it differs between keys.

Shapes: B examples, L tokens (text first, then image), K output positions, D width, H heads, N layers.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Expert = Literal["vision", "language", "vision_language"]
Route = dict[Expert, slice]

EPSILON = 1e-6  # of the encoder's LayerNorms
TEXT_EPSILON = 1e-12  # of BERT's


def named_layers(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def build_for_experts(experts: tuple[Expert, ...], build: Callable[[], nn.Module]) -> nn.Module:
    """Return a module that all tokens share, or, with `experts`, one for each by name."""
    return nn.ModuleDict({name: build() for name in experts}) if experts else build()


def apply_routed(module: nn.Module, x: Tensor, route: Route) -> Tensor:
    """Apply what `build_for_experts` built: a shared module to `x` (B, L, D), or each expert's to its span.

    A single expert reads all of `x`, which may then be the vectors of selected positions.
    """
    if not isinstance(module, nn.ModuleDict):
        return module(x)  # type: ignore[no-any-return]
    parts = [module[expert](x if len(route) == 1 else x[:, span]) for expert, span in route.items()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def gather(x: Tensor, positions: Tensor) -> Tensor:
    """Return the vectors of `x` (B, L, D) at `positions` (B, K): (B, K, D)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def gather_bias(bias: Tensor, positions: Tensor) -> Tensor:
    """Return the query rows of an attention bias (1 or B, H, L, L) at `positions` (B, K): (B, H, K, L)."""
    if len(bias) != 1:
        return bias.gather(2, positions[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3]))
    # An embedding lookup: its backward neither sorts nor serializes as that of indexing does.
    rows = F.embedding(positions, rearrange(bias, "1 h q k -> q (h k)"))
    return rearrange(rows, "b q (h k) -> b h q k", h=bias.shape[1])


def key_padding(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the padding of each key: 0, or a huge negative value where `keep` (B, L) is False, finite to avoid NaN."""
    return torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, torch.finfo(dtype).min / 2)


class Attention(nn.Module):
    """Self-attention over all tokens, whose projections they share or, with `experts`, have by modality.

    With `sub_norm`, the epsilon of a LayerNorm in front of the output projection (Magneto, arXiv 2210.06423).
    """

    key_bias: nn.Parameter | None

    def __init__(
        self,
        width: int,
        heads: int,
        key_bias: bool = False,
        experts: tuple[Expert, ...] = (),
        sub_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.joint = build_for_experts(experts, lambda: nn.Linear(width, 3 * width)) if experts else None
        if not experts:
            # Owned by this module, not by three Linears: ZeRO-3 gathers a parameter only for the module that owns it.
            self.weight = nn.Parameter(torch.empty(3 * width, width))
            self.query_bias = nn.Parameter(torch.zeros(width))
            self.register_parameter("key_bias", nn.Parameter(torch.zeros(width)) if key_bias else None)
            self.value_bias = nn.Parameter(torch.zeros(width))

        def output() -> nn.Module:
            linear = nn.Linear(width, width)
            return linear if sub_norm is None else named_layers(norm=nn.LayerNorm(width, eps=sub_norm), linear=linear)

        self.projection = build_for_experts(experts, output)

    def forward(
        self, x: Tensor, route: Route, bias: Tensor | None, padding: Tensor | None, output_positions: Tensor | None
    ) -> Tensor:
        """Return (B, L, D), or (B, K, D) for the queries at `output_positions` (B, K).

        `bias` (H, L, L or B, H, L, L) and `padding` (B, L) are added to the scaled products of queries and keys.
        """
        if self.joint is not None:
            joint = apply_routed(self.joint, x, route)
            query, key, value = rearrange(joint, "b l (three h d) -> three b h l d", three=3, h=self.heads).unbind(0)
            if output_positions is not None:
                query = query.gather(2, output_positions[:, None, :, None].expand(-1, self.heads, -1, query.shape[3]))
        elif output_positions is None:
            joint = F.linear(x, self.weight, self.biases())
            query, key, value = rearrange(joint, "b l (three h d) -> three b h l d", three=3, h=self.heads).unbind(0)
        else:
            width = x.shape[-1]
            query = F.linear(gather(x, output_positions), self.weight[:width], self.query_bias)
            query = rearrange(query, "b l (h d) -> b h l d", h=self.heads)
            joint = F.linear(x, self.weight[width:], self.biases()[width:])
            key, value = rearrange(joint, "b l (two h d) -> two b h l d", two=2, h=self.heads).unbind(0)
        if bias is not None:
            bias = bias if bias.dim() == 4 else bias.unsqueeze(0)
            bias = bias if output_positions is None else gather_bias(bias, output_positions)
        if padding is not None:
            padding = padding[:, None, None, :]
            bias = padding if bias is None else bias + padding
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        if bias is not None and not len(x):
            # The kernel drops the bias of an empty batch, but every rank must run the same graph (contract C3).
            mixed = mixed + 0 * bias.sum()
        return apply_routed(self.projection, rearrange(mixed, "b h l d -> b l (h d)"), route)

    def biases(self) -> Tensor:
        """Return the biases (3 D) of shared queries, keys and values."""
        key_bias = torch.zeros_like(self.query_bias) if self.key_bias is None else self.key_bias
        return torch.cat([self.query_bias, key_bias, self.value_bias])


class QuickGELU(nn.Module):
    """The approximation of GELU with which OpenAI trained CLIP: x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class MultiwayBlock(nn.Module):
    """Pre-norm block: the LayerScale gammas are shared, each expert has a norm of its own.

    Attention and its norm are shared, too, or `routed` to the experts. With `sub_norm`, output projections have norms.
    """

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
        activation: type[nn.Module] = nn.GELU,
        routed: bool = False,
        sub_norm: bool = False,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        attending = experts if routed else ()
        self.norm = build_for_experts(attending, lambda: nn.LayerNorm(width, eps=epsilon))
        self.attention = Attention(width, heads, key_bias, attending, epsilon if sub_norm else None)
        self.experts = nn.ModuleDict()
        for name in experts:
            norm, hidden = nn.LayerNorm(width, eps=epsilon), ratio * width
            expand, contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
            between = {"inner_norm": nn.LayerNorm(hidden, eps=epsilon)} if sub_norm else {}
            self.experts[name] = named_layers(norm=norm, expand=expand, gelu=activation(), **between, contract=contract)
        for gamma in ("attention_gamma", "expert_gamma"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
            self.register_parameter(gamma, scale)

    def forward(
        self,
        x: Tensor,
        route: Route,
        bias: Tensor | None = None,
        padding: Tensor | None = None,
        drop_path_mask: Tensor | None = None,
        output_positions: Tensor | None = None,
    ) -> Tensor:
        """Return (B, L, D), or (B, K, D) at `output_positions` (B, K) for a last block of which the rest is unused.

        `route` names the token span of each expert; spans tile the sequence in order. `drop_path_mask` (B, 2) bool is
        True where an example keeps its attention and feed-forward branch; None keeps all, unscaled.
        """
        mixed = self.attention(apply_routed(self.norm, x, route), route, bias, padding, output_positions)
        if output_positions is not None:
            assert len(route) == 1, "output_positions need one expert that reads the whole sequence"
            x = gather(x, output_positions)
        attention_scale = expert_scale = None
        if drop_path_mask is not None:  # factors (B, 1, 1): 0 where dropped, 1 / (1 - rate) where kept
            scale = 1.0 / (1.0 - self.drop_path) if self.drop_path < 1 else 0.0
            attention_scale, expert_scale = (drop_path_mask.to(x.dtype) * scale)[:, :, None, None].unbind(1)
        x = _add_branch(x, mixed, self.attention_gamma, attention_scale)
        return _add_branch(x, apply_routed(self.experts, x, route), self.expert_gamma, expert_scale)


def _add_branch(x: Tensor, branch: Tensor, gamma: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return x + gamma * scale * branch, reading the branch once."""
    if gamma is None:
        return x + branch if scale is None else torch.addcmul(x, branch, scale)
    return torch.addcmul(x, branch, gamma if scale is None else gamma * scale)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    expert: Expert,
    padding: Tensor | None = None,
    drop_path_mask: Tensor | None = None,
    output_positions: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Run blocks of a single expert, with `drop_path_mask` (B, N, 2); the last one computes only `output_positions`.

    `bias` (1 or H, L, L) is added to every layer's products of queries and keys.
    """
    blocks = list(blocks)
    for layer, block in enumerate(blocks):
        keep = None if drop_path_mask is None else drop_path_mask[:, layer]
        positions = output_positions if layer == len(blocks) - 1 else None
        x = block(x, {expert: slice(None)}, bias, padding, keep, positions)
    return x
