"""The workload of a stage, measured on a model without memory, equals that of the real step."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from pipeline.planning.estimate import largest_share
from pipeline.planning.memory import Work
from pipeline.training.full_batch import full_batch
from pipeline.training.stages import Stage
from pipeline.training.workload import model_without_memory, parameters_of, peak_step_seconds, run_step, work_of
from tests.support.engines import build_engine
from tests.support.tiny_model import VOCABULARY, tiny_config
from tests.support.trial import cells, trial_config


@pytest.mark.parametrize("index", range(4))
def test_flops_and_parameters_equal_those_of_a_real_step(index: int) -> None:
    config = tiny_config()
    built, stage = build_engine(config, index, plain=True), Stage(config, index)
    with FlopCounterMode(display=False) as counter:
        built.step(full_batch(config, stage.config, stage.config.global_batch_size, VOCABULARY))
    model = model_without_memory(stage, VOCABULARY)
    # FLOPs of attention are counted because VLMo's trainable bias prevents the fused kernel on CPU.
    assert run_step(model, stage, VOCABULARY, "cpu").flops == counter.get_total_flops()
    sizes, trained = parameters_of(model), [p.numel() for p in built.engine.model.parameters() if p.requires_grad]
    assert (sizes.trained, sizes.total) == (sum(trained), sum(p.numel() for p in built.engine.model.parameters()))


ONE_OF_A_KIND = {f"{cell.kind}-{cell.objective}": cell for cell in cells() if "visual_tokens" not in str(cell)}


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_every_objective_of_every_model_can_be_planned(name: str) -> None:
    stage = Stage(trial_config(ONE_OF_A_KIND[name]), 0)
    costs = run_step(model_without_memory(stage, VOCABULARY), stage, VOCABULARY, "cuda")
    assert min(costs.flops, costs.activations, costs.tokens) > 0


def work(index: int, **engine: object) -> Work:
    return work_of(Stage(tiny_config(**engine), index), VOCABULARY, "cuda")


def test_micro_batches_read_the_itc_towers_twice() -> None:
    pairs = work(2)
    assert pairs.step_flops(12, 1) < pairs.step_flops(12, 2)
    assert pairs.contrast_flops > 0


def test_bfloat16_halves_most_of_the_activations() -> None:
    half, exact = work(0, precision="bfloat16"), work(0)
    assert 0.4 < half.activations.per_example / exact.activations.per_example < 0.8


def test_activation_checkpointing_saves_memory_and_adds_flops() -> None:
    kept, recomputed = work(2), work(2, activation_checkpointing=True)
    assert recomputed.activations.per_example < 0.6 * kept.activations.per_example
    assert recomputed.flops.per_example > 1.15 * kept.flops.per_example


def test_peak_step_time_scales_with_the_gpu() -> None:
    stage = Stage(tiny_config(), 2)
    h100, l40s, unknown = (
        peak_step_seconds(gpu, stage, VOCABULARY, 3)
        for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA L40S", "A GPU of next year")
    )
    share = largest_share(stage.config.global_batch_size, 3)
    assert h100 == pytest.approx(work(2).step_flops(share, 1) / 989e12)
    assert l40s == pytest.approx(h100 * 989 / 362)
    assert unknown is None
