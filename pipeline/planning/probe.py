"""Measurement of running code: the bytes that its tensors occupy, and its FLOPs.

Storages are tracked from allocation to release, so that tensors saved by autograd, dropped by checkpointing and
temporary in backward are counted without naming any layer. It works on the meta device as on real tensors; only the
attention kernel of the target device must be given.

Shapes: B examples, H heads, Q queries, K keys, D width of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
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


class Followed(TorchDispatchMode):
    """Counts `flops` and the bytes of storages allocated inside the context: alive now (`live`) and at most (`peak`).

    Storages of the `known` tensors (weights and the batch) are not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._followed: dict[int, Any] = {storage._cdata: None for storage in self._known}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if isinstance(result, Tensor):
            self._follow(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._follow(leaf)
        formula = flop_registry.get(function._overloadpacket)  # type: ignore[attr-defined]
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Exclude a tensor that was made unwatched, and its views."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._followed[key] = weakref.ref(storage, lambda _: self._followed.pop(key, None))

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._followed or not size:
            return

        def released(_: Any) -> None:
            self._followed.pop(key, None)
            self.live -= size

        self._followed[key] = weakref.ref(storage, released)
        self.live += size
        self.peak = max(self.peak, self.live)


class FusedAttention:
    """Replaces attention on meta tensors by an operation with the bytes and FLOPs of the device's kernel.

    Values are not computed. It patches torch's function, because a function mode would not be active when backward
    recomputes checkpointed blocks.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels, self.flops = kernels, 0
        self._plain: Callable[..., Tensor] = F.scaled_dot_product_attention

    def __enter__(self) -> Self:
        self._plain = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._attend  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = self._plain

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        biased = attn_mask is not None and attn_mask.requires_grad
        if query.device.type != "meta" or (self.kernels == "cpu" and biased):
            # On the meta device torch takes the plain path by itself, as the CPU does for a bias with a gradient.
            return self._plain(query, key, value, attn_mask=attn_mask, **kwargs)
        return _Kernel.apply(self, query, key, value, attn_mask)


class _Kernel(torch.autograd.Function):
    """Flash or memory-efficient attention: saves queries, keys, values, bias, result and one float32 per query."""

    @staticmethod
    def forward(
        ctx: Any, mode: FusedAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        mixed = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.mode = mode
        ctx.save_for_backward(query, key, value, mixed, logsumexp, *([] if mask is None else [mask]))
        mode.flops += _attention_flops(query, key, value)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _, _, *mask = ctx.saved_tensors
        ctx.mode.flops += 2 * _attention_flops(query, key, value)  # recomputation is not counted
        gradients_in: list[Tensor | None] = [torch.empty_like(tensor) for tensor in (query, key, value)]
        if mask and mask[0].requires_grad:
            mask_gradient = mask[0].new_empty(*query.shape[:-1], key.shape[-2])  # per example, summed afterwards
            gradients_in.append(mask_gradient.sum_to_size(mask[0].shape))
        return None, *gradients_in, *([None] if len(gradients_in) == 3 else [])


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Return the FLOPs of both products: 2 B H Q K D for the scores and the same for the weighted sum."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


class Probe:
    """Counts bytes and FLOPs of the code inside `with`; `known` tensors are excluded."""

    def __init__(self, known: Iterable[Tensor], kernels: Kernels) -> None:
        self._followed, self._attention = Followed(known), FusedAttention(kernels)

    def __enter__(self) -> Self:
        self._attention.__enter__()
        self._followed.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._followed.__exit__(kind, error, trace)
        self._attention.__exit__()

    @property
    def live_bytes(self) -> int:
        return self._followed.live

    @property
    def peak_bytes(self) -> int:
        return self._followed.peak

    def leave_out(self, tensor: Tensor) -> None:
        """Exclude a tensor that was made unwatched, and its views."""
        self._followed.leave_out(tensor)

    def forget_peak(self) -> None:
        """Reset `peak_bytes` to the bytes alive now."""
        self._followed.peak = self._followed.live

    @property
    def flops(self) -> int:
        """FLOPs of all matrix multiplications so far, two per multiply-add."""
        return self._followed.flops + self._attention.flops
