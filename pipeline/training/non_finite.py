"""Where a number that is not finite came from: the step is run again, and every module's output and gradient looked at.

A loss is a sum over the whole batch and a gradient a sum over all ranks, so neither says who spoilt it. The first
module in the order of execution does, on the rank where it happened: features travel between ranks, and later modules
of other ranks are spoilt too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.training.collectives import Collectives


@dataclass(frozen=True)
class Finding:
    """The first of its kind on one rank; `order` counts the modules run in the pass until then."""

    order: int
    module: str
    told: str


class Tracer:
    """Notes the first module whose output, and the first whose output's gradient, is not finite."""

    def __init__(self) -> None:
        self.forward: Finding | None = None
        self.backward: Finding | None = None
        self._ran = self._differentiated = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = [module.register_forward_hook(self._hook(name)) for name, module in model.named_modules() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self._ran += 1
            for tensor in _tensors(output):
                if self.forward is None and not _finite(tensor):
                    self.forward = Finding(self._ran, name, _cause(module, inputs, tensor))
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._look_back(name, gradient))

        return after

    def _look_back(self, name: str, gradient: Tensor) -> None:
        self._differentiated += 1
        if self.backward is None and not _finite(gradient):
            self.backward = Finding(self._differentiated, name, f"the gradient of its output holds {_what(gradient)}")


def describe(losses: dict[str, Tensor], collectives: Collectives) -> str:
    """Which losses are not finite, and on which ranks. A collective call."""
    own = {name: loss.item() for name, loss in losses.items() if not _finite(loss)}
    told = [
        f"'{name}' is {value} on rank {rank}"
        for rank, found in enumerate(collectives.gather_json(own))
        for name, value in found.items()
    ]
    return ", ".join(told) if told else "the gradient is not finite, though the losses are"


def diagnose(model: nn.Module, again: Callable[[], object], collectives: Collectives) -> str:
    """The first module, and its rank, with a number that is not finite when `again` repeats the step's passes.

    A collective call; what `again` adds to gradients must not be used any more.
    """
    tracer = Tracer()
    with tracer.watching(model):
        again()
    own = [each and asdict(each) for each in (tracer.forward, tracer.backward)]
    gathered = collectives.gather_json(own)
    findings = [[each and Finding(**each) for each in found] for found in gathered]
    for number, passed in enumerate(("forward", "backward")):
        found = [(each[number].order, rank, each[number]) for rank, each in enumerate(findings) if each[number]]
        if found:
            _, rank, first = min(found, key=lambda each: each[:2])
            return f"first in module '{first.module}' on rank {rank}, in the {passed} pass: {first.told}"
    return "no module's output or gradient is, when the step is run again: a sum over rows or ranks overflowed"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())


def _what(tensor: Tensor) -> str:
    bad = ~tensor.detach().isfinite()
    kind = "nan" if bool(tensor.detach().isnan().any()) else "inf"
    return f"{kind} ({int(bad.sum())} of {bad.numel()} numbers)"


def _cause(module: nn.Module, inputs: Any, output: Tensor) -> str:
    told = f"its output holds {_what(output)}"
    spoilt = [name for name, parameter in module.named_parameters() if parameter.numel() and not _finite(parameter)]
    if spoilt:
        return f"{told}, its parameter '{spoilt[0]}' {_what(dict(module.named_parameters())[spoilt[0]])}"
    if not all(_finite(tensor) for tensor in _tensors(inputs)):
        return f"{told}, and so did what it was given"
    return f"{told}; its inputs and parameters are finite"
