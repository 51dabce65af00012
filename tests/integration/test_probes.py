"""DeepSpeed probes through our engine: experts used in turn get autograd's gradient, or the run is stopped.

DeepSpeed 0.19.8 by itself re-applies the last gradient of an expert that a step leaves idle (ZeRO 3; ZeRO 1-3 with
offload), loses or doubles gradients of several backward passes over different branches, and mixes the gradients of
ranks that run different experts.
"""

import copy
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.errors import RunFailed
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.training.collectives import Collectives
from pipeline.training.health import ExecutionOrderCheck
from pipeline.training.stages import Stage
from tests.support.engines import ReadableEngine
from tests.support.gradients import relative_errors
from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

WIDTH, ROWS, RATE = 7, 4, 0.1  # an odd width: two ranks' parts of a tensor are cut inside a row
LAYOUTS: list[dict[str, Any]] = [
    *({"zero_stage": stage} for stage in range(4)),
    *({"zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)),
    {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
]
# Steps of micro-batches, each naming the experts it reads.
SCENARIOS = {
    "idle experts": [["A"], ["B"], ["A"], ["ABC"], ["C"]],
    "several backwards": [["A", "B"], ["AB", "C"], ["C", "A"], ["B", "B"], ["A", "C"]],
}
# The experts of each rank's first call: different ones of equal shape; and one more on rank 1.
DIVERGING = [("A", "B"), ("A", "AC")]
GUARDED = [layout for layout in LAYOUTS if not layout.get("offload_parameters")]


class Experts(nn.Module):
    """A shared layer and three experts, of which a call runs those it names."""

    HEAD_PARTS: ClassVar = ()
    BLOCK: ClassVar = ()

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "ABC"})
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))

    def forward(self, passes: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.experts[name](self.shared(x)).pow(2).mean() for name, x in passes.items()}

    def part_of(self, parameter: str) -> str:
        return parameter


def _loss(model: Any, step: int, micro_batch: int, rank: int, experts: str) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank)
    passes = {name: torch.randn(ROWS, WIDTH, generator=draw) for name in experts}
    return torch.stack(list(model(passes).values())).sum()


def _expected(steps: list[list[str]], world_size: int) -> list[dict[str, Tensor]]:
    """Return gradients, their norm and the weights of each step of autograd in one process.

    An idle expert's gradient is 0, and Adam still updates it.
    """
    model, settings, results = Experts(), tiny_config().stages[0].optimizer, []
    biases, matrices = ([p for p in model.parameters() if (p.dim() >= 2) == decays] for decays in (False, True))
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=settings.betas, eps=settings.eps)
    for number, micro_batches in enumerate(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for k, experts in enumerate(micro_batches):
            for rank in range(world_size):
                _loss(model, number, k, rank, experts).backward()
        result = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
        result["norm"] = nn.utils.get_total_norm(list(result.values()))
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        adam.step()
        results.append(result | {f"weight {name}": w for name, w in copy.deepcopy(model.state_dict()).items()})
    return results


def _in_turn(collectives: Any, steps: list[list[str]], layout: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Return the same of an engine; only rank 0 has the weights."""
    config = tiny_config(micro_batch_size=12 // collectives.world_size // len(steps[0]), **layout)
    engine, results = ReadableEngine(Experts(), Stage(config, 0), collectives), []
    for number, micro_batches in enumerate(steps):
        scale = collectives.world_size * len(micro_batches)  # DeepSpeed divides by both
        for k, experts in enumerate(micro_batches):
            loss = _loss(engine, number, k, collectives.rank, experts)
            engine.backward(loss * scale, last=k == len(micro_batches) - 1)
        result = {f"gradient of {name}": gradient for name, gradient in engine.gradients().items()}
        engine.step(RATE)
        result["norm"] = torch.tensor(float(engine.gradient_norm))
        results.append(result | {f"weight {name}": weight for name, weight in (engine.weights() or {}).items()})
    engine.close()
    return results


def _diverging(collectives: Any, experts: tuple[str, str], layout: dict[str, Any]) -> str:
    """Return the error that stops a guarded step; it may not reduce gradients."""
    model, check = Experts(), ExecutionOrderCheck(collectives, every=10, first_step=70)
    check.on_model_built(model)
    engine = ReadableEngine(model, Stage(tiny_config(**layout), 0), collectives)
    check.before_step(0)
    try:
        engine.backward(_loss(engine, 0, 0, collectives.rank, experts[collectives.rank]), last=True)
    except RunFailed as error:
        return str(error)
    return "reduced the gradients of different experts"


def _vlmo_in_turn(collectives: Any) -> dict[str, float]:
    """Alternate image-only and text-only steps of VLMo, whose other expert and embedding are idle; return errors."""

    def loss(model: Any, config: Any, step: int, rank: int) -> Tensor:
        rows = tiny_batch(config, step, rank, collectives.world_size, 12)
        image = ForwardInput(heads=("tokens",), image=rows.image)
        text = ForwardInput(heads=("tokens",), text=rows.text, text_keep=rows.text_keep)
        return model({"rows": (image, text)[step % 2]})["rows"]["tokens"].pow(3).sum()

    worst = {}
    for layout in LAYOUTS[3:]:
        config = tiny_config(**layout)
        plain, model = (build_model(config.model, VOCABULARY, seed=5) for _ in range(2))
        engine = ReadableEngine(model, Stage(config, 0), collectives)
        for step in range(3):
            for parameter in plain.parameters():
                parameter.grad = torch.zeros_like(parameter)
            for rank in range(collectives.world_size):
                loss(plain, config, step, rank).backward()
            engine.backward(loss(engine, config, step, collectives.rank) * collectives.world_size, last=True)
            expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
            worst[f"{layout}, step {step}"] = max(relative_errors(expected, engine.gradients()).values())
            engine.step(0.0)  # so that both continue from equal weights
        engine.close()
    return worst


def _run_probes() -> tuple[dict[str, Any], list[str], dict[str, float]]:
    collectives = Collectives()
    in_turn = {name: [_in_turn(collectives, steps, layout) for layout in LAYOUTS] for name, steps in SCENARIOS.items()}
    stopped = [_diverging(collectives, experts, layout) for layout in GUARDED for experts in DIVERGING]
    return in_turn, stopped, _vlmo_in_turn(collectives)


def test_probe_experts_used_in_turn_equal_autograd_and_diverging_ranks_stop_before_reduction() -> None:
    probed = run_ranks(_run_probes, 2)
    for scenario, steps in SCENARIOS.items():
        for layout, results in zip(LAYOUTS, probed[0][0][scenario], strict=True):
            for number, (expected, result) in enumerate(zip(_expected(steps, 2), results, strict=True)):
                assert result.keys() == expected.keys()
                for what, value in expected.items():
                    error = float((result[what] - value).norm() / value.norm().clamp(min=1e-3))
                    assert error <= 1e-5, f"{scenario}, {layout}, step {number}: {what} {error:.1e}"
    for _, stopped, _ in probed:
        for error, (_, other) in zip(stopped, DIVERGING * len(GUARDED), strict=True):
            second = "'experts.B'" if other == "B" else "'shared'"
            assert error.startswith("step 70: ranks ran different modules; call "), error
            assert ("rank 0 ran 'experts.A'" in error) == (other == "B"), error
            assert f"rank 1 ran {second}" in error
    assert {where: error for where, error in probed[0][2].items() if not error <= 1e-5} == {}


def test_modules_are_compared_in_the_first_steps_and_then_periodically() -> None:
    """Between them nothing is compared: that would need collectives."""
    model, check = Experts(), ExecutionOrderCheck(None, every=10)  # type: ignore[arg-type]
    check.on_model_built(model)
    check.before_step(0)
    for step in (3, 9, 11, 10):
        check.before_step(step)
        with pytest.raises(AttributeError, match="largest") if step == 10 else nullcontext():
            _loss(model, step, 0, 0, "A")
        if step != 10:
            check.after_backward(step)
