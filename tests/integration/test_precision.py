"""bfloat16 with float32 masters, moments and reductions, at ZeRO 1, 2 and 3 on two ranks; ZeRO 0 is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

STAGE = 2
LAYOUTS: list[dict[str, Any]] = [
    *({"zero_stage": stage} for stage in (1, 2, 3)),
    *({"zero_stage": stage, "offload_optimizer": True, "micro_batch_size": 3} for stage in (1, 2, 3)),
]
Bits = dict[tuple[str, str], Tensor]  # by parameter and kind


@dataclass(frozen=True)
class Session:
    """What one engine held; whole tensors, put together from both ranks' fragments."""

    restored_exactly: bool
    at_start: Bits
    gradients: dict[str, Tensor]
    rounded: dict[str, Tensor]  # what forward reads, at the end
    at_end: Bits
    handed_over: dict[str, Tensor]


def _model(config: Any) -> Any:
    from pipeline.models import build_model
    from pipeline.models.model import HeadConfig

    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) != "image_embedding")  # one part is frozen
    return model


def _sessions(folder: str) -> list[Session] | None:
    """Two steps in each layout, each going on from the checkpoint of the one before."""
    from pipeline.config.schema import CheckpointConfig
    from pipeline.data.storage import Storage
    from pipeline.training.checkpoint import CheckpointStore
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.steps import TrainingStep

    collectives = Collectives()
    sessions = []
    for number, layout in enumerate(LAYOUTS):
        config = tiny_config(precision="bfloat16", **layout)
        stage = config.stages[STAGE]
        engine = DeepSpeedEngine(_model(config), config, stage, collectives)
        store = CheckpointStore(Storage(config.storage), folder, collectives, CheckpointConfig(keep=9))
        exact, at_start = True, _bits(engine, collectives)
        if (found := store.latest()) is not None:
            engine.restore(found[1])
            exact = all(
                torch.equal(value, found[1].read(fragment.name, kind, fragment.start, fragment.start + len(value)))
                for fragment in engine.fragments()
                for kind, value in fragment.values.items()
            )
        step = TrainingStep(engine, config, stage, collectives)
        for k in range(2):
            step(tiny_batch(config, 2 * number + k, collectives.rank, collectives.world_size, stage.global_batch_size))
            gradients = engine.gradients()
            engine.step(1e-3)
        done = 2 * number + 2
        metadata = {"step": done, "stage": stage.name, "stage_step": done, "plan_digest": "plan", "data_counts": {}}
        store.save(engine.fragments(), metadata | {"zero_stage": config.engine.zero_stage})
        store.wait()
        rounded = {} if config.engine.zero_stage == 3 else {n: p.detach().clone() for n, p in _named(engine)}
        sessions.append(
            Session(exact, at_start, gradients, rounded, _bits(engine, collectives), engine.weights() or {})
        )
        engine.close()
    return sessions if collectives.rank == 0 else None


def _named(engine: Any) -> Any:
    return engine.module.named_parameters()


def _bits(engine: Any, collectives: Any) -> Bits:
    parts: dict[tuple[str, str], list[tuple[int, Tensor]]] = {}
    own = [(f.name, kind, f.start, value.clone()) for f in engine.fragments() for kind, value in f.values.items()]
    for rank in collectives.gather_objects(own):
        for name, kind, start, value in rank:
            parts.setdefault((name, kind), []).append((start, value))
    return {key: torch.cat([value for _, value in sorted(own, key=lambda part: part[0])]) for key, own in parts.items()}


def _needs_float32(tensors: Any) -> float:
    """The share of numbers that bfloat16 would round."""
    flat = torch.cat([tensor.float().flatten() for tensor in tensors])
    return float((flat != flat.bfloat16().float()).float().mean())


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> list[Session]:
    return run_ranks(_sessions, 2, str(tmp_path_factory.mktemp("run")))[0]


def test_masters_begin_as_the_float32_weights_themselves_also_those_of_frozen_parts(sessions: list[Session]) -> None:
    expected = dict(_model(tiny_config()).named_parameters())
    for layout, session in zip(LAYOUTS, sessions, strict=True):
        wrong = [n for n, p in expected.items() if not torch.equal(p.flatten(), session.at_start[n, "weight"])]
        assert not wrong, (layout, wrong)


def test_masters_and_moments_are_float32_and_pass_every_checkpoint_bit_for_bit(sessions: list[Session]) -> None:
    for layout, session in zip(LAYOUTS, sessions, strict=True):
        assert session.restored_exactly, layout
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert _needs_float32(v for (_, k), v in session.at_end.items() if k == kind) > 0.5, (layout, kind)


def test_gradients_are_summed_over_ranks_and_micro_batches_in_float32(sessions: list[Session]) -> None:
    for layout, session in zip(LAYOUTS, sessions, strict=True):
        assert _needs_float32(session.gradients.values()) > 0.2, layout


def test_forward_reads_the_masters_rounded_and_the_next_stage_gets_them_whole(sessions: list[Session]) -> None:
    for layout, session in zip(LAYOUTS, sessions, strict=True):
        for name, weight in session.handed_over.items():
            master = session.at_end[name, "weight"]
            assert torch.equal(weight.flatten(), master), (layout, name)
            if session.rounded:
                assert torch.equal(session.rounded[name].flatten(), master.bfloat16()), (layout, name)
