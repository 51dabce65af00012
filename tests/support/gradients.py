"""The reference engine, and the comparison of gradients with its (contract C2)."""

import torch
from torch import Tensor

from pipeline.config.schema import OptimizerConfig
from pipeline.models.forward import ForwardInput, ForwardOutput
from pipeline.models.model import Model

TOLERANCE = 1e-5  # largest allowed error, as defined by `relative_errors`


class PlainEngine:
    """Autograd and torch's AdamW in one process: the reference that every other engine must match."""

    def __init__(self, model: Model, optimizer: OptimizerConfig):
        self.model = model
        self.forwards: dict[str, ForwardInput] = {}  # of the last call
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )

    def __call__(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        self.forwards = passes
        return self.model(passes)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of all parameters that received one since the last step."""
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()


def relative_errors(expected: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """Return |g - g*| / (|g*| + 0.01 |all g*|) of each parameter; infinite for a missing or misshapen gradient.

    A value of at most 1e-5 is contract C2's |g - g*| <= 1e-5 |g*| + 1e-7 |all g*|.
    """
    everything = torch.stack([g.double().norm() for g in expected.values()]).norm()
    errors = {}
    for name, gradient in expected.items():
        if name not in got or got[name].shape != gradient.shape:
            errors[name] = float("inf")
            continue
        difference = (got[name].double() - gradient.double()).norm()
        errors[name] = float(difference / (gradient.double().norm() + 0.01 * everything))
    return errors | {name: float("inf") for name in got.keys() - expected.keys()}
