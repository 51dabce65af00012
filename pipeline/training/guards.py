"""The graph guard (contract C3): in the first steps and now and then later, ranks compare what they executed.

DeepSpeed gives silently wrong gradients when ranks run different modules in one step (`diverging_ranks` among the
project's probes: 96 % error at ZeRO 2), so a mismatch must stop the run before the update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from torch import nn

from pipeline.config.errors import RunFailed
from pipeline.training.collectives import Collectives

FIRST_STEPS = 3


class GraphGuard:
    """Records the order in which a step runs the model's modules and compares it across ranks."""

    def __init__(self, model: nn.Module, collectives: Collectives, every: int):
        self.collectives = collectives
        self.every = every
        self._active = False
        self._executed: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(self._recorder(name))

    def _recorder(self, name: str) -> Callable[[nn.Module, object], None]:
        def record(module: nn.Module, arguments: object) -> None:
            if self._active:
                self._executed.append(name)

        return record

    def begin(self, step: int) -> None:
        """Before a step's forward; `step` counts from the start of the stage or of the process."""
        self._active = step < FIRST_STEPS or step % self.every == 0
        self._executed.clear()

    def check(self, step: int) -> None:
        """After the step's backward, before its update. Raises RunFailed naming the first difference."""
        if not self._active:
            return
        self._active = False
        digest = hashlib.sha256("\n".join(self._executed).encode()).hexdigest()
        digests = self.collectives.gather_objects(digest)
        if len(set(digests)) == 1:
            return
        executed = self.collectives.gather_objects(self._executed)
        raise RunFailed(f"step {step}: ranks ran different modules; {_first_difference(executed)}")


def _first_difference(executed: list[list[str]]) -> str:
    longest = max(len(names) for names in executed)
    for position in range(longest):
        names = [rank[position] if position < len(rank) else "(nothing)" for rank in executed]
        if len(set(names)) > 1:
            told = ", ".join(f"rank {rank} ran '{name}'" for rank, name in enumerate(names))
            return f"call {position}: {told}"
    raise AssertionError("called for equal sequences")
