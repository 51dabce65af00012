"""Autograd and torch's AdamW in one process: what every other engine must agree with; tests and trials train with it.

It serves a training step, and no run: nothing of it can be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.schema import OptimizerConfig
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import Model


class PlainEngine:
    def __init__(self, model: Model, optimizer: OptimizerConfig):
        self.model = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        return self.model(passes)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter that got one, since the last step."""
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
