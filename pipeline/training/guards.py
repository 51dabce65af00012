"""The graph guard (contract C3): in the first steps and now and then later, ranks compare what they execute.

DeepSpeed gives silently wrong gradients when ranks run different modules in one step (`diverging_ranks` among the
project's probes: 96 % error at ZeRO 2; at ZeRO 3 it mixes weights, or hangs). So ranks compare before any gradient is
reduced, at the end of each forward; and at ZeRO 3, whose forward gathers weights, before each module runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from pipeline.config.errors import RunFailed
from pipeline.training.collectives import Collectives

FIRST_STEPS = 3
END = "(the end of the forward)"


class GraphGuard:
    """Records the order in which a step's forwards run the model's modules and compares it across ranks.

    Raises RunFailed, on every rank, naming the first modules that differ. Must be built before the engine: at ZeRO 3
    its comparison has to come before the engine's own hooks. What a backward computes once more, in activation
    checkpointing, is not recorded; nor is what runs inside a compiled block, only the block.
    """

    def __init__(self, model: nn.Module, collectives: Collectives, every: int):
        self.collectives = collectives
        self.every = every
        self._model = model
        self._step = 0
        self._active = self._inside = self._before_each = False
        self._executed: list[str] = []
        self._digest = hashlib.sha256()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._enter if module is model else self._recorder(name))
        model.register_forward_hook(self._leave)

    def begin(self, step: int, first: int = 0) -> None:
        """Before a step's forward; `step` counts from the start of the stage or of the process.

        `first` is the global step of the first one, for messages.
        """
        self._step = first + step
        self._before_each = any(hasattr(parameter, "ds_id") for parameter in self._model.parameters())  # at ZeRO 3
        self._active = step < FIRST_STEPS or step % self.every == 0
        self._executed.clear()
        self._digest = hashlib.sha256()

    def check(self, step: int) -> None:
        """After the step's backward, before its update; `step` is the global one. Every forward was compared before."""
        if self._active:
            self._step = step
            self._compare()
        self._active = False

    def _enter(self, module: nn.Module, arguments: object) -> None:
        self._inside = True

    def _recorder(self, name: str) -> Callable[[nn.Module, object], None]:
        def record(module: nn.Module, arguments: object) -> None:
            if not torch.compiler.is_compiling() and self._active and self._inside:
                self._record(name)
                if self._before_each:
                    self._compare()

        return record

    def _leave(self, module: nn.Module, arguments: object, result: object) -> None:
        self._inside = False
        if self._active:
            self._record(END)
            self._compare()

    def _record(self, name: str) -> None:
        self._executed.append(name)
        self._digest.update(f"{name}\n".encode())

    def _compare(self) -> None:
        digest = int.from_bytes(self._digest.digest()[:7], "big")
        if self.collectives.largest([digest, -digest]) == [digest, -digest]:
            return
        executed = self.collectives.gather_json(self._executed)
        raise RunFailed(
            f"step {self._step}: ranks ran different modules; {_first_difference(executed)}. Gradients would have been "
            "wrong in silence. What a step runs must follow from its number alone, never from a rank's own data."
        )


def _first_difference(executed: list[list[str]]) -> str:
    longest = max(len(names) for names in executed)
    for position in range(longest):
        names = [rank[position] if position < len(rank) else "(nothing)" for rank in executed]
        if len(set(names)) > 1:
            told = ", ".join(f"rank {rank} ran '{name}'" for rank, name in enumerate(names))
            return f"call {position}: {told}"
    raise AssertionError("called for equal sequences")
