"""Watching code run: the bytes that its tensors hold, and the arithmetic it asks for.

Storages are followed from the operation that makes them to their release, so that what autograd saves, what
checkpointing drops, and what backward holds for a moment are found without naming any layer. It works on tensors
without memory (the meta device) as on real ones; only attention must be told which kernel the device will choose.

Shapes: B rows, H heads, Q queries, K keys, D width of a head.
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

# Which attention a device runs: CUDA's kernels never hold the products of queries and keys, with a bias or without; the
# CPU's kernel has no gradient for a bias, and falls back to plain arithmetic there.
Kernels = Literal["cuda", "cpu"]

unwatched = _disable_current_modes  # a context in which nothing is followed


class Followed(TorchDispatchMode):
    """Bytes of the storages made while it is entered, alive now (`live`) and most at any time (`peak`), and `flops`.

    Storages of the `known` tensors are nobody's: weights, and the batch.
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
        """A tensor made unwatched stays nobody's, and so do its views."""
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
    """Runs every attention as the chosen device's kernels would, as far as bytes and arithmetic go; `flops` counts it.

    Values are not computed: it is for tensors without memory. While it is entered it stands in torch's own place: a
    function mode would not be there when a backward computes blocks again.
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
            # Tensors without memory take the plain path, as a bias with a gradient does on the CPU, by themselves.
            return self._plain(query, key, value, attn_mask=attn_mask, **kwargs)
        return _Kernel.apply(self, query, key, value, attn_mask)


class _Kernel(torch.autograd.Function):
    """Saves the queries, keys, values, bias, result, and one float32 a query: flash and memory-efficient attention."""

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
        ctx.mode.flops += 2 * _attention_flops(query, key, value)  # what it computes anew is not counted
        found: list[Tensor | None] = [torch.empty_like(tensor) for tensor in (query, key, value)]
        if mask and mask[0].requires_grad:
            whole = mask[0].new_empty(*query.shape[:-1], key.shape[-2])  # of every row, summed afterwards
            found.append(whole.sum_to_size(mask[0].shape))
        return None, *found, *([None] if len(found) == 3 else [])


def _attention_flops(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of both products: 2 B H Q K D for the scores, and as many for the mixing."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


class Probe:
    """Follows bytes and arithmetic of what runs inside `with`; `known` tensors are not counted."""

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
        """Do not count a tensor that was made unwatched, nor its views."""
        self._followed.leave_out(tensor)

    def forget_peak(self) -> None:
        """Begin `peak_bytes` anew from what is alive."""
        self._followed.peak = self._followed.live

    @property
    def flops(self) -> int:
        """Of all multiplications of matrices so far: two for each product that is added."""
        return self._followed.flops + self._attention.flops
