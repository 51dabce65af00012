"""Contract C2 for fine-tuning's objectives: one gradient for every ranks x micro-batch x ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support.fine_tuning_data import run_config
from tests.support.ranks import run_ranks

Found = tuple[dict[str, Tensor], dict[str, float]]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "questions": ("vqa", {"num_answers": 6}),
    "statements": ("nlvr2", {}),
    "labelled": ("classification", {"num_classes": 4}),
}


def _gradients(folder: str, source_type: str, zero_stage: int, micro_batch_size: int | None) -> Found:
    """The gradient and losses of one batch of real rows, drop path and all, on this rank."""
    from pipeline.data.contents.text import Tokenizer
    from pipeline.data.loading.loader import Loader
    from pipeline.data.reading.samples import iter_captions
    from pipeline.data.storage import Storage
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.stages import build_stage_model
    from pipeline.training.steps import TrainingStep

    objective, keys = CASES[source_type]
    collectives = Collectives()
    if collectives.rank == 0:
        run_config(Path(folder), source_type, objective, 1, **keys)  # draws the shards
    collectives.barrier()
    config = run_config(Path(folder), source_type, objective, 1, is_drawn=True, **keys)
    engine_config = config.engine.model_copy(update={"zero_stage": zero_stage, "micro_batch_size": micro_batch_size})
    model = config.model.model_copy(update={"drop_path": 0.1})
    config = config.model_copy(update={"engine": engine_config, "model": model})
    stage, storage = config.stages[0], Storage()
    tokenizer = Tokenizer.train([*iter_captions(storage, config.sources["train"].shards), "x"], 200)
    engine = DeepSpeedEngine(build_stage_model(config, 0, storage, tokenizer.size), config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    with Loader(config, stage, storage, tokenizer, collectives.rank, collectives.world_size) as loader:
        losses = step(next(loader.batches(0)))
    return engine.gradients(), {name: float(collectives.sum(loss)) for name, loss in losses.items()}


@pytest.mark.parametrize("source_type", CASES)
def test_the_gradient_of_the_global_batch_is_that_of_one_process(tmp_path: Path, source_type: str) -> None:
    expected, losses = run_ranks(_gradients, 1, str(tmp_path), source_type, 0, None)[0]
    everything = sum(g.double().square().sum() for g in expected.values()) ** 0.5
    for world_size, zero_stage, micro_batch_size in ((2, 2, 5), (3, 3, None)):
        found, found_losses = run_ranks(
            _gradients, world_size, str(tmp_path), source_type, zero_stage, micro_batch_size
        )[0]
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (found[name].double() - gradient.double()).norm()
            assert error <= 1e-5 * gradient.double().norm() + 1e-7 * everything, (name, float(error))
