"""What all ranks learn together before an update: one small sum over the ranks.

Everything in it must be known to every rank at the same step, or some would wait for ever for the rest: that a loss or
gradient is not finite, that a machine is about to go, the loss of the whole batch. One reduction of four numbers
carries them all; a second process group or a reduction read a step later would save the wait for the device, and could
neither stop before the update nor lose no step. `guards.health_check_every` spreads the looks where the wait shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.training.collectives import Collectives


@dataclass(frozen=True)
class Look:
    """The same on every rank."""

    loss: float  # of the global batch
    bad_losses: int  # ranks with a part of a loss that is not finite
    bad_gradients: int  # ranks that hold a part of the gradient that is not finite
    notices: int  # ranks that were told to go


def look(losses: dict[str, Tensor], gradients: Iterable[Tensor], notice: bool, collectives: Collectives) -> Look:
    """`losses`: this rank's parts, 0-d; `gradients`: those its next update reads. A collective call.

    A norm that overflows counts as not finite: the update would divide by it.
    """
    own = torch.zeros(4, device=collectives.device)
    parts = torch.stack([loss.float() for loss in losses.values()])
    own[0] = losses["loss"]
    own[1] = ~parts.isfinite().all()
    own[2] = ~_norm(list(gradients)).to(collectives.device).isfinite()
    own[3] = float(notice)
    loss, bad_losses, bad_gradients, notices = collectives.sum(own).tolist()
    return Look(loss, round(bad_losses), round(bad_gradients), round(notices))


def _norm(gradients: list[Tensor]) -> Tensor:
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients)
    return torch.stack([norm.float() for norm in norms]).sum()
