"""What DeepSpeed leaves wrong in ZeRO's gradient buffers where a backward does not reach every expert, made right.

DeepSpeed writes a gradient where a parameter was reached and nothing where it was not, so that (0.19.8; the first found
by the project's probe `idle_expert`, the others through `tests/integration/test_probes.py`):

  ZeRO 3                    a parameter that a step leaves idle gets its last gradient again, and one idle in the step's
                            first micro-batch has it added
  ZeRO 1, 2, 3, offloaded   the same
  ZeRO 2, 3, offloaded      a parameter idle in the step's last micro-batch loses what the others gave it

Both remedies use attributes that DeepSpeed does not document; a release without them fails here by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


class GradientBuffers:
    """The buffers of one ZeRO optimizer of DeepSpeed's."""

    def __init__(self, optimizer: Any, zero_stage: int, offloaded: bool):
        self._optimizer, self._zero_stage, self._offloaded = optimizer, zero_stage, offloaded

    def complete(self, accumulated: bool) -> None:
        """After a step's last backward: hand over what earlier ones gave to parameters that this one did not reach."""
        if self._offloaded and self._zero_stage >= 2 and accumulated:
            self._optimizer.finalize_gradient_accumulation_boundary()

    def clear(self) -> None:
        """After a step's update: a parameter that the next step leaves idle has the gradient 0."""
        for buffer in self._buffers():
            buffer.zero_()

    def _buffers(self) -> Iterator[Tensor]:
        """Those that outlive a step; of the others DeepSpeed makes new ones."""
        if self._zero_stage == 3:
            yield self._optimizer.grad_partitions_flat_buffer
            if self._offloaded:
                yield from (group.grad for group in self._optimizer.fp32_partitioned_groups_flat)
        elif self._offloaded:
            yield from (group.grad for group in self._optimizer.single_partition_of_fp32_groups)
            yield from self._optimizer.accumulated_grads_in_cpu.values()
