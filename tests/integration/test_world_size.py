"""Contract C2: the gradient of a global batch is the same for every ranks x micro-batch x accumulation x ZeRO stage."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from tiny import VOCABULARY, tiny_batch, tiny_config
from torch import Tensor

Gradients = dict[str, Tensor]
NUM_STAGES = len(tiny_config().stages)


def _gradients_of_stages(zero_stage: int, micro_batch: int | None) -> list[tuple[Gradients, dict[str, float]]]:
    """The global gradient and losses of one batch of each stage, through the engine, on this rank."""
    return [_stage_gradients(index, zero_stage, micro_batch) for index in range(NUM_STAGES)]


def _stage_gradients(index: int, zero_stage: int, micro_batch: int | None) -> tuple[Gradients, dict[str, float]]:
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.steps import TrainingStep

    config = tiny_config(zero_stage=zero_stage, micro_batch=micro_batch)
    collectives = Collectives()
    stage = config.stages[index]
    engine = DeepSpeedEngine(_model(config, index), config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    batch = tiny_batch(config, 1, collectives.rank, collectives.world_size, stage.batch)
    losses = {name: float(collectives.sum(loss)) for name, loss in step(batch).items()}
    gradients = engine.gradients()
    engine.close()
    return gradients, losses


def _model(config, index):
    from pipeline.models import build_model
    from pipeline.models.model import Heads
    from pipeline.training.stages import trained_parts

    model = build_model(config.model, VOCABULARY, Heads("pixels"), seed=5)
    trained = trained_parts(model, config, config.stages[index])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model.part_of(name) in trained)
    return model


def _plain_gradients(index: int) -> tuple[Gradients, dict[str, float]]:
    from pipeline.training.collectives import Collectives
    from pipeline.training.plain_engine import PlainEngine
    from pipeline.training.steps import TrainingStep

    config = tiny_config()
    stage = config.stages[index]
    engine = PlainEngine(_model(config, index), stage.optimizer)
    losses = TrainingStep(engine, config, stage, Collectives())(tiny_batch(config, 1, 0, 1, stage.batch))
    return engine.gradients(), {name: float(loss) for name, loss in losses.items()}


def _plain_gradients_of_stages() -> list[tuple[Gradients, dict[str, float]]]:
    return [_plain_gradients(index) for index in range(NUM_STAGES)]


@pytest.fixture(scope="module")
def plain() -> list[tuple[Gradients, dict[str, float]]]:
    return run_ranks(_plain_gradients_of_stages, 1)[0]


LAYOUTS = [(1, 0, None), (1, 2, 5), (2, 0, None), (2, 1, 3), (2, 2, None), (2, 3, None), (3, 2, 2), (5, 1, None)]


@pytest.mark.parametrize(("world_size", "zero_stage", "micro_batch"), LAYOUTS)
def test_gradient_of_the_global_batch_is_that_of_one_process(plain, world_size, zero_stage, micro_batch):
    answers = run_ranks(_gradients_of_stages, world_size, zero_stage, micro_batch)[0]
    for (expected, expected_losses), (got, losses) in zip(plain, answers, strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert got.keys() == expected.keys()
        everything = torch.sqrt(sum(g.double().square().sum() for g in expected.values()))
        for name, gradient in expected.items():
            error = (got[name].double() - gradient.double()).norm()
            assert error <= 1e-5 * gradient.double().norm() + 1e-7 * everything, (name, float(error))


def _losses_of_20_steps(zero_stage: int) -> list[float]:
    """The losses, then the gradient norm of the last step."""
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.schedule import learning_rate
    from pipeline.training.steps import TrainingStep

    config = tiny_config(zero_stage=zero_stage)
    stage, size = config.stages[2], 16
    stage = stage.model_copy(update={"batch": size})
    collectives = Collectives()
    engine = DeepSpeedEngine(_model(config, 2), config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    losses = []
    for number in range(20):
        loss = step(tiny_batch(config, number, collectives.rank, collectives.world_size, size))["loss"]
        engine.step(learning_rate(number, 20, stage.optimizer))
        losses.append(float(collectives.sum(loss)))
    return [*losses, engine.gradient_norm()]


@pytest.fixture(scope="module")
def losses_at_zero_2() -> list[float]:
    return run_ranks(_losses_of_20_steps, 2, 2)[0]


@pytest.mark.parametrize(("world_size", "zero_stage"), [(2, 0), (2, 1), (2, 3), (3, 2)])
def test_twenty_steps_have_the_same_losses_at_every_zero_stage_and_uneven_world(
    losses_at_zero_2, world_size, zero_stage
):
    assert run_ranks(_losses_of_20_steps, world_size, zero_stage)[0] == pytest.approx(losses_at_zero_2, rel=1e-5)
