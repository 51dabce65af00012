"""The workload of a stage, measured on a model without memory, equals that of the real step."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.storage import Storage
from pipeline.planning.estimate import largest_share
from pipeline.training.collectives import Collectives
from pipeline.training.full_batch import full_batch
from pipeline.training.stages import Stage, build_stage_model
from pipeline.training.step import TrainingStep
from pipeline.training.workload import model_without_memory, parameters_of, peak_step_seconds, run_step, work_of
from tests.support.gradients import PlainEngine
from tests.support.tiny_model import VOCABULARY, tiny_config
from tests.support.trial import cells, trial_config


@pytest.mark.parametrize("index", range(4))
def test_flops_equal_those_of_a_real_step(index):
    config = tiny_config()
    stages = tuple(each.model_copy(update={"start_from": "random"}) for each in config.stages)
    config = config.model_copy(update={"stages": stages})
    stage = config.stages[index]
    model = build_stage_model(Stage(config, index), Storage(), VOCABULARY)
    step = TrainingStep(PlainEngine(model, stage.optimizer), Stage(config, index), Collectives())
    with FlopCounterMode(display=False) as counter:
        step(full_batch(config, stage, stage.global_batch_size, VOCABULARY))
    # FLOPs of attention are counted because VLMo's trainable bias prevents the fused kernel on CPU.
    found = run_step(model_without_memory(Stage(config, index), VOCABULARY), Stage(config, index), VOCABULARY, "cpu")
    assert found.flops == counter.get_total_flops()


def test_parameter_counts_equal_those_of_the_trained_model():
    config = tiny_config()
    model = build_stage_model(Stage(config, 0), Storage(), VOCABULARY)
    found = parameters_of(model_without_memory(Stage(config, 0), VOCABULARY))
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_micro_batches_read_the_itc_towers_twice():
    work = work_of(Stage(tiny_config(), 2), VOCABULARY, "cpu")
    assert work.step_flops(12, 1) < work.step_flops(12, 2)
    assert work.contrast_flops > 0


def test_bfloat16_halves_most_of_the_activations():
    exact, half = (work_of(Stage(tiny_config(precision=p), 0), VOCABULARY, "cuda") for p in ("float32", "bfloat16"))
    assert 0.4 < half.activations.per_example / exact.activations.per_example < 0.8


ONE_OF_A_KIND = {f"{cell.kind}-{cell.objective}": cell for cell in cells() if "visual_tokens" not in str(cell)}


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_every_objective_of_every_model_can_be_planned(name):
    config = trial_config(ONE_OF_A_KIND[name])
    found = run_step(model_without_memory(Stage(config, 0), VOCABULARY), Stage(config, 0), VOCABULARY, "cuda")
    assert found.flops > 0
    assert found.activations > 0
    assert found.tokens > 0


def test_activation_checkpointing_saves_memory_and_adds_flops():
    def work(recomputed: bool):
        return work_of(Stage(tiny_config(activation_checkpointing=recomputed), 2), VOCABULARY, "cuda")

    kept, recomputed = work(False), work(True)
    assert recomputed.activations.per_example < 0.6 * kept.activations.per_example
    assert recomputed.flops.per_example > 1.15 * kept.flops.per_example


def test_peak_step_time_scales_with_the_gpu():
    config, work = tiny_config(), work_of(Stage(tiny_config(), 2), VOCABULARY, "cuda")
    share = largest_share(config.stages[2].global_batch_size, 3)
    h100 = peak_step_seconds("NVIDIA H100 80GB HBM3", Stage(config, 2), VOCABULARY, 3)
    assert h100 == pytest.approx(work.step_flops(share, 1) / 989e12)
    assert peak_step_seconds("NVIDIA L40S", Stage(config, 2), VOCABULARY, 3) == pytest.approx(h100 * 989 / 362)
    assert peak_step_seconds("A GPU of next year", Stage(config, 2), VOCABULARY, 3) is None
