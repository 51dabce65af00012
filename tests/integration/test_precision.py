"""bfloat16 with float32 masters, moments and reductions, at ZeRO 1, 2 and 3 on two ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def test_masters_start_as_the_float32_weights_and_stay_unrounded(tmp_path: Path) -> None:
    """So do the moments and the reduced gradients, in every layout; the forward uses rounded masters."""
    from tests.support.engines import tiny_model

    initial = dict(tiny_model(tiny_config(), STAGE).named_parameters())  # with those of frozen modules
    for layout, session in zip(LAYOUTS, run_ranks(_sessions, 2, str(tmp_path))[0], strict=True):
        assert session.restored_exactly, layout
        start = session.at_start
        assert not [name for name, p in initial.items() if not torch.equal(p.flatten(), start[name, "weight"])], layout
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            values = (value for (_, value_kind), value in session.at_end.items() if value_kind == kind)
            assert _fraction_rounded(values) > 0.5, (layout, kind)
        assert _fraction_rounded(session.gradients.values()) > 0.2, layout
        for name, weight in session.final_weights.items():
            master = session.at_end[name, "weight"]
            assert torch.equal(weight.flatten(), master), (layout, name)
            if session.rounded:
                assert torch.equal(session.rounded[name].flatten(), master.bfloat16()), (layout, name)
