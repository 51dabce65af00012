"""What one step of a stage asks of a rank, as found by running it: the estimate's only knowledge of models.

`pipeline.training.workload` finds it; a row is one sample of the batch with all the passes that read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A number that grows linearly in the rows of a micro-batch."""

    fixed: float
    per_row: float

    @classmethod
    def through(cls, one: tuple[int, float], other: tuple[int, float]) -> Line:
        """The line through two points (rows, value)."""
        slope = (other[1] - one[1]) / (other[0] - one[0])
        return cls(one[1] - slope * one[0], slope)

    def at(self, rows: float) -> float:
        return max(0.0, self.fixed + self.per_row * rows)


@dataclass(frozen=True)
class Parameters:
    """Numbers of elements of a stage's model."""

    trained: int
    frozen: int
    buffers: int  # bytes of what a model keeps beside its parameters
    largest: int  # of one parameter
    tensors: int = 1  # how many parameters there are

    @property
    def total(self) -> int:
        return self.trained + self.frozen


@dataclass(frozen=True)
class Work:
    parameters: Parameters
    flops: Line  # of a whole share in one micro-batch: forward and backward
    flops_per_row_accumulated: float  # of shares that are cut: what is read twice counts twice
    activations: Line  # bytes alive when a micro-batch's backward begins
    workspace: Line  # bytes that its backward holds for a moment beside these
    tokens: Line  # positions that enter the encoder, over all passes
    batch_bytes_per_row: float  # of what the loader hands over
    contrast_flops: int  # of the global batch's contrast, which every rank computes
    contrast_bytes: int  # the most that it holds for a moment
    contrast_width: int  # numbers of a row's features, which every rank gets from every other

    def step_flops(self, share: int, accumulation: int) -> float:
        """A rank's arithmetic in one step over its share of the global batch."""
        if accumulation == 1:
            return self.flops.at(share) + self.contrast_flops
        return self.flops_per_row_accumulated * share + self.contrast_flops
