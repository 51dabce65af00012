"""Contract C2: the gradient of a global batch is the same for every ranks x micro-batch x accumulation x ZeRO stage."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from tests.support.gradients import TOLERANCE, Layout, Sharding, engine_gradients, plain_gradients, relative_errors
from tests.support.ranks import run_ranks
from tests.support.tiny_model import VOCABULARY, tiny_batch, tiny_config

Gradients = dict[str, Tensor]
NUM_STAGES = len(tiny_config().stages)


def _gradients_of_stages(zero_stage: int, micro_batch_size: int | None) -> list[tuple[Gradients, dict[str, float]]]:
    """The global gradient and losses of one batch of each stage, through the engine, on this rank."""
    return [_stage_gradients(index, zero_stage, micro_batch_size) for index in range(NUM_STAGES)]


def _stage_gradients(index: int, zero_stage: int, micro_batch_size: int | None) -> tuple[Gradients, dict[str, float]]:
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.steps import TrainingStep

    config = tiny_config(zero_stage=zero_stage, micro_batch_size=micro_batch_size)
    collectives = Collectives()
    stage = config.stages[index]
    engine = DeepSpeedEngine(_model(config, index), config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    batch = tiny_batch(config, 1, collectives.rank, collectives.world_size, stage.global_batch_size)
    losses = {name: float(collectives.sum(loss)) for name, loss in step(batch).items()}
    gradients = engine.gradients()
    engine.close()
    return gradients, losses


def _model(config, index):
    from pipeline.models import build_model
    from pipeline.models.model import HeadConfig
    from pipeline.training.stages import trained_parts

    model = build_model(config.model, VOCABULARY, HeadConfig("pixels"), seed=5)
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
    losses = TrainingStep(engine, config, stage, Collectives())(tiny_batch(config, 1, 0, 1, stage.global_batch_size))
    return engine.gradients(), {name: float(loss) for name, loss in losses.items()}


def _plain_gradients_of_stages() -> list[tuple[Gradients, dict[str, float]]]:
    return [_plain_gradients(index) for index in range(NUM_STAGES)]


@pytest.fixture(scope="module")
def plain() -> list[tuple[Gradients, dict[str, float]]]:
    return run_ranks(_plain_gradients_of_stages, 1)[0]


LAYOUTS = [(1, 2, 5), (2, 3, None), (3, 2, 2)]  # the next test has the others, for the stage with most objectives


@pytest.mark.parametrize(("world_size", "zero_stage", "micro_batch_size"), LAYOUTS)
def test_gradient_of_the_global_batch_is_that_of_one_process(plain, world_size, zero_stage, micro_batch_size):
    answers = run_ranks(_gradients_of_stages, world_size, zero_stage, micro_batch_size)[0]
    for (expected, expected_losses), (got, losses) in zip(plain, answers, strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert got.keys() == expected.keys()
        everything = torch.sqrt(sum(g.double().square().sum() for g in expected.values()))
        for name, gradient in expected.items():
            error = (got[name].double() - gradient.double()).norm()
            assert error <= 1e-5 * gradient.double().norm() + 1e-7 * everything, (name, float(error))


# Every sharding, with and without accumulation, on one, two, three and five ranks.
CELLS = {
    Layout(1, 48): [Sharding(3, offload_optimizer=True, offload_parameters=True)],
    Layout(2, 8): [Sharding(1), Sharding(2, offload_optimizer=True), Sharding(3, offload_optimizer=True)],
    Layout(3, 16): [Sharding(0), Sharding(1, offload_optimizer=True)],
    Layout(5, 10): [Sharding(2), Sharding(3)],
}


@pytest.mark.parametrize("layout", CELLS, ids=str)
def test_gradient_of_48_pairs_is_that_of_autograd_however_they_are_cut_and_sharded(table_expected, layout):
    for sharding, got in zip(CELLS[layout], engine_gradients(layout, CELLS[layout]), strict=True):
        errors = relative_errors(table_expected, got)
        assert max(errors.values()) <= TOLERANCE, (str(sharding), max(errors, key=errors.get), max(errors.values()))


@pytest.fixture(scope="module")
def table_expected() -> Gradients:
    return plain_gradients()


def _losses(steps: int, zero_stages: list[int]) -> list[list[float]]:
    """At each ZeRO stage the losses of all steps, then the gradient norm of the last."""
    from pipeline.training.collectives import Collectives

    collectives = Collectives()
    return [_losses_at(collectives, steps, zero_stage) for zero_stage in zero_stages]


def _losses_at(collectives, steps: int, zero_stage: int) -> list[float]:
    from pipeline.training.deepspeed_engine import DeepSpeedEngine
    from pipeline.training.schedule import learning_rate
    from pipeline.training.steps import TrainingStep

    config = tiny_config(zero_stage=zero_stage)
    stage, size = config.stages[2], 16
    stage = stage.model_copy(update={"global_batch_size": size})
    engine = DeepSpeedEngine(_model(config, 2), config, stage, collectives)
    step = TrainingStep(engine, config, stage, collectives)
    losses = []
    for number in range(steps):
        loss = step(tiny_batch(config, number, collectives.rank, collectives.world_size, size))["loss"]
        engine.step(learning_rate(number, steps, stage.optimizer))
        losses.append(float(collectives.sum(loss)))
    engine.close()
    return [*losses, engine.gradient_norm()]


@pytest.fixture(scope="module")
def losses_of_two_ranks() -> list[list[float]]:
    return run_ranks(_losses, 2, 20, [2, 0, 1, 3])[0]


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_twenty_steps_have_the_same_losses_at_every_zero_stage(losses_of_two_ranks, zero_stage):
    at = dict(zip([2, 0, 1, 3], losses_of_two_ranks, strict=True))
    assert at[zero_stage] == pytest.approx(at[2], rel=1e-5)


def test_twenty_steps_have_the_same_losses_on_ranks_of_unequal_shares(losses_of_two_ranks):
    assert run_ranks(_losses, 3, 20, [2])[0][0] == pytest.approx(losses_of_two_ranks[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_losses_equal_on_one_to_four_ranks_at_every_zero_stage():
    stages, steps = [0, 1, 2, 3], 100 if "MOME_LONG_RUNS" in os.environ else 5  # a hundred take half an hour
    found = {w: run_ranks(_losses, w, steps, stages, seconds=3600.0)[0] for w in (1, 2, 3, 4)}
    expected = found[1][0][:-1]
    worst = {
        f"{w} ranks, ZeRO {stage}": max(abs(got / right - 1) for got, right in zip(losses[:-1], expected, strict=True))
        for w, by_stage in found.items()
        for stage, losses in zip(stages, by_stage, strict=True)
    }
    print("worst relative difference of a loss from one rank at ZeRO 0:", worst)
    assert max(worst.values()) <= 1e-5, worst
