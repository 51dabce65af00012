"""Measurement of running code: the bytes that its tensors occupy, and its FLOPs, also on the meta device.

Storages are tracked from allocation to release, so that tensors saved by autograd, dropped by checkpointing and
temporary in backward are counted without naming any layer.
Shapes: B examples, H heads, Q queries, K keys, D width of a head.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# The attention kernels of a device: CUDA's never materialize the query-key products, with or without a bias; the CPU's
# has no gradient for a bias and falls back to plain operations.
Kernels = Literal["cuda", "cpu"]

unwatched = _disable_current_modes  # a context manager in which nothing is counted


class Probe(TorchDispatchMode):
    """Counts FLOPs (two per multiply-add) and bytes of storages, except of `known` tensors: alive now and at most.

    Attention on meta tensors is replaced by an operation with the bytes and FLOPs of the device's kernel; it patches
    torch's function, because a function mode would not be active when backward recomputes checkpointed blocks.
    """

    def __init__(self, known: Iterable[Tensor], kernels: Kernels) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = 0
        self._kernels = kernels
        self._known = [tensor.untyped_storage() for tensor in known]  # kept alive, so that no address is reused
        self._followed: dict[int, Any] = {storage._cdata: None for storage in self._known}

    def __enter__(self) -> Self:
        self._plain_attention: Callable[..., Tensor] = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._attend  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention = self._plain_attention

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.follow(leaf)
        formula = flop_registry.get(function._overloadpacket)  # type: ignore[attr-defined]
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def follow(self, tensor: Tensor, counted: bool = True) -> None:
        """Track a tensor's storage; do not count it, nor its views, if it was made unwatched."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._followed or (counted and not size):
            return

        def released(_: Any) -> None:
            self._followed.pop(key, None)
            self.live_bytes -= size

        self._followed[key] = weakref.ref(storage, released)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        biased = attn_mask is not None and attn_mask.requires_grad
        if query.device.type != "meta" or (self._kernels == "cpu" and biased):
            # On the meta device torch takes the plain path by itself, as the CPU does for a bias with a gradient.
            return self._plain_attention(query, key, value, attn_mask=attn_mask, **kwargs)
        return _FusedAttention.apply(self, query, key, value, attn_mask)


class _FusedAttention(torch.autograd.Function):
    """Flash or memory-efficient attention: saves queries, keys, values, bias, result and one float32 per query."""

    @staticmethod
    def forward(ctx: Any, probe: Probe, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        mixed = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mixed, logsumexp, *([] if mask is None else [mask]))
        batch, heads, queries, width = query.shape
        # 2 B H Q K D for the scores, and the same for the weighted sum.
        ctx.probe, ctx.flops = probe, 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])
        probe.flops += ctx.flops
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _, _, *mask = ctx.saved_tensors
        ctx.probe.flops += 2 * ctx.flops  # recomputation is not counted
        gradients_in: list[Tensor | None] = [torch.empty_like(tensor) for tensor in (query, key, value)]
        mask_gradient = None
        if mask and mask[0].requires_grad:  # one per example, summed afterwards
            mask_gradient = mask[0].new_empty(*query.shape[:-1], key.shape[-2]).sum_to_size(mask[0].shape)
        return None, *gradients_in, mask_gradient
