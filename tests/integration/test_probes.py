"""DeepSpeed probes through our engine: experts used in turn get autograd's gradient, or the run is stopped.

DeepSpeed 0.19.8 by itself re-applies the last gradient of an expert that a step leaves idle (ZeRO 3; ZeRO 1-3 with
offload), loses or doubles gradients of several backward passes over different branches, and mixes the gradients of
ranks that run different experts.
"""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

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

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "ABC"})
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                draw = torch.Generator().manual_seed(number)
                parameter.copy_(torch.randn(parameter.shape, generator=draw))

    def forward(self, passes: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.experts[name](self.shared(x)).pow(2).mean() for name, x in passes.items()}

    def part_of(self, parameter: str) -> str:
        return parameter

    def transformer_blocks(self) -> list[nn.Module]:
        return []


def _passes(step: int, micro_batch_size: int, rank: int, experts: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + 10 * micro_batch_size + rank)
    return {name: torch.randn(ROWS, WIDTH, generator=draw) for name in experts}


Step = tuple[dict[str, Tensor], float, dict[str, Tensor]]  # gradients, their norm, weights after it


def _expected(steps: list[list[str]], world_size: int) -> list[Step]:
    """Return the steps of autograd in one process; an idle expert's gradient is 0 and Adam still updates it."""
    model, settings, results = Experts(), tiny_config().stages[0].optimizer, []
    biases, matrices = ([p for p in model.parameters() if (p.dim() >= 2) == decays] for decays in (False, True))
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=settings.betas, eps=settings.eps)
    for number, micro_batches in enumerate(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for k, experts in enumerate(micro_batches):
            for rank in range(world_size):
                torch.stack(list(model(_passes(number, k, rank, experts)).values())).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = float(nn.utils.get_total_norm(gradients.values()))
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        adam.step()
        results.append((gradients, norm, copy.deepcopy(model.state_dict())))
    return results


# Of each scenario, in every layout, its steps; in every guarded layout, what stopped each step of ranks that diverge;
# the worst relative error of each layout and step of a VLMo whose experts are idle in turn.
Probed = tuple[dict[str, list[list[Step]]], list[str], dict[str, float]]


def _run_probes() -> Probed:
    """Run all probes on one set of ranks."""
    from pipeline.training.collectives import Collectives

    collectives = Collectives()
    in_turn = {name: [_in_turn(collectives, steps, layout) for layout in LAYOUTS] for name, steps in SCENARIOS.items()}
    stopped = [_diverging(collectives, experts, layout) for layout in GUARDED for experts in DIVERGING]
    return in_turn, stopped, _vlmo_in_turn(collectives)


@pytest.fixture(scope="module")
def probed() -> list[Probed]:
    return run_ranks(_run_probes, 2)


def _in_turn(collectives: Any, steps: list[list[str]], layout: dict[str, Any]) -> list[Step]:
    """Return the steps of an engine whose experts are used in turn."""
    from pipeline.training.stages import Stage
    from tests.support.engines import ReadableEngine

    config = tiny_config(micro_batch_size=12 // collectives.world_size // len(steps[0]), **layout)
    engine, results = ReadableEngine(Experts(), Stage(config, 0), collectives), []
    for number, micro_batches in enumerate(steps):
        scale = collectives.world_size * len(micro_batches)  # DeepSpeed divides by both
        for k, experts in enumerate(micro_batches):
            outputs = engine(_passes(number, k, collectives.rank, experts))
            loss = torch.stack(list(outputs.values())).sum()
            engine.backward(loss * scale, last=k == len(micro_batches) - 1)
        gradients = engine.gradients()
        engine.step(RATE)
        results.append((gradients, engine.gradient_norm(), engine.weights() or {}))
    engine.close()
    return results


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_probe_experts_used_in_turn_equal_autograd(probed: list[Probed], scenario: str) -> None:
    expected = _expected(SCENARIOS[scenario], 2)
    for layout, steps in zip(LAYOUTS, probed[0][0][scenario], strict=True):
        for number, ((gradients, norm, weights), got) in enumerate(zip(expected, steps, strict=True)):
            pairs = {
                **{f"gradient of {name}": (g, got[0][name]) for name, g in gradients.items()},
                "norm": (torch.tensor(norm), torch.tensor(got[1])),
                **{f"weight {name}": (w, got[2][name]) for name, w in weights.items()},
            }
            for what, (good, value) in pairs.items():
                error = float((value - good).norm() / good.norm().clamp(min=1e-3))
                assert error <= 1e-5, f"{layout}, step {number}: {what} {error:.1e}"


def _diverging(collectives: Any, experts: tuple[str, str], layout: dict[str, Any]) -> str:
    """Return the error that stops a guarded step; it may not reduce gradients."""
    from pipeline.config.errors import RunFailed
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.health import ExecutionOrderCheck
    from pipeline.training.stages import Stage

    model = Experts()
    check = ExecutionOrderCheck(collectives, every=10, first_step=70)
    check.on_model_built(model)
    engine = DeepSpeedEngine(model, Stage(tiny_config(**layout), 0), collectives)
    check.before_step(0)
    try:
        outputs = engine(_passes(0, 0, collectives.rank, experts[collectives.rank]))
        engine.backward(torch.stack(list(outputs.values())).sum(), last=True)
    except RunFailed as error:
        return str(error)
    return "reduced the gradients of different experts"


def test_probe_diverging_ranks_stop_before_reduction(probed) -> None:
    for _, stopped, _ in probed:
        for error, (_, other) in zip(stopped, DIVERGING * len(GUARDED), strict=True):
            second = "'experts.B'" if other == "B" else "'shared'"
            assert error.startswith("step 70: ranks ran different modules; call "), error
            assert ("rank 0 ran 'experts.A'" in error) == (other == "B"), error
            assert f"rank 1 ran {second}" in error


def _vlmo_in_turn(collectives: Any) -> dict[str, float]:
    """Alternate image-only and text-only steps of VLMo: the other expert and its embedding are idle."""
    from pipeline.models import build_model
    from pipeline.models.forward import ForwardInput
    from pipeline.training.stages import Stage
    from tests.support.engines import ReadableEngine

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


def test_probe_idle_experts_of_vlmo_equal_autograd(probed) -> None:
    assert {where: error for where, error in probed[0][2].items() if not error <= 1e-5} == {}
