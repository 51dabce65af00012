"""bfloat16 with float32 masters, moments and reductions, at ZeRO 1, 2 and 3 on two ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.tiny_model import tiny_config

STAGE, FROZEN = 2, ("image_embedding",)
LAYOUTS: list[dict[str, Any]] = [
    *({"zero_stage": stage} for stage in (1, 2, 3)),
    *({"zero_stage": stage, "offload_optimizer": True, "micro_batch_size": 3} for stage in (1, 2, 3)),
]
State = dict[tuple[str, str], Tensor]  # (parameter, kind) -> whole tensor, flattened


@dataclass(frozen=True)
class Session:
    """The state of one engine, put together from both ranks' fragments."""

    restored_exactly: bool
    at_start: State
    gradients: dict[str, Tensor]
    rounded: dict[str, Tensor]  # the weights that forward reads, at the end; empty at ZeRO 3
    at_end: State
    final_weights: dict[str, Tensor]


def _sessions(folder: str) -> list[Session] | None:
    """Make two steps in each layout, resuming from the checkpoint of the layout before."""
    from tests.support.engines import build_engine, tiny_model

    sessions = []
    for number, layout in enumerate(LAYOUTS):
        config = tiny_config(precision="bfloat16", **layout)
        built = build_engine(config, STAGE, model=tiny_model(config, STAGE, freeze=FROZEN))
        engine, at_start = built.engine, _state(built)
        exact = built.restore(folder) is not False
        for step in (2 * number, 2 * number + 1):
            built.step(built.batch(step))
            gradients = engine.gradients()
            engine.step(1e-3)
        built.save(folder, 2 * number + 2).wait()
        parameters = () if config.engine.zero_stage == 3 else engine.module.named_parameters()
        rounded = {name: parameter.detach().clone() for name, parameter in parameters}
        sessions.append(Session(exact, at_start, gradients, rounded, _state(built), engine.weights() or {}))
        engine.close()
    return sessions if built.collectives.rank == 0 else None


def _state(built: Any) -> State:
    fragments = built.engine.fragments()
    own = [(f.name, kind, f.start, value.clone()) for f in fragments for kind, value in f.values.items()]
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for rank in built.collectives.gather_objects(own):
        for name, kind, start, value in rank:
            parts.setdefault((name, kind), {})[start] = value
    return {key: torch.cat([by_start[start] for start in sorted(by_start)]) for key, by_start in parts.items()}


def _fraction_rounded(tensors: Iterable[Tensor]) -> float:
    """Return the fraction of numbers that bfloat16 would round."""
    flat = torch.cat([tensor.float().flatten() for tensor in tensors])
    return float((flat != flat.bfloat16().float()).float().mean())


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], Session]]:
    return list(zip(LAYOUTS, run_ranks(_sessions, 2, str(tmp_path_factory.mktemp("run")))[0], strict=True))


def test_masters_start_as_the_float32_weights(sessions) -> None:
    from tests.support.engines import tiny_model

    expected = dict(tiny_model(tiny_config(), STAGE).named_parameters())  # with those of frozen modules
    for layout, session in sessions:
        unequal = [
            name for name, p in expected.items() if not torch.equal(p.flatten(), session.at_start[name, "weight"])
        ]
        assert not unequal, layout


def test_masters_and_moments_are_float32_in_every_checkpoint(sessions) -> None:
    for layout, session in sessions:
        assert session.restored_exactly, layout
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            values = (value for (_, value_kind), value in session.at_end.items() if value_kind == kind)
            assert _fraction_rounded(values) > 0.5, (layout, kind)


def test_gradients_are_reduced_in_float32(sessions) -> None:
    for layout, session in sessions:
        assert _fraction_rounded(session.gradients.values()) > 0.2, layout


def test_forward_uses_rounded_masters_but_weights_are_float32(sessions) -> None:
    for layout, session in sessions:
        for name, weight in session.final_weights.items():
            master = session.at_end[name, "weight"]
            assert torch.equal(weight.flatten(), master), (layout, name)
            if session.rounded:
                assert torch.equal(session.rounded[name].flatten(), master.bfloat16()), (layout, name)
