"""Activation checkpointing and torch.compile: less memory, or less time, and the same gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.schema import EngineConfig
from tests.support.gradients import TOLERANCE, relative_errors
from tests.support.ranks import run_ranks

Gradients = dict[str, Tensor]
# Of each kind an objective that uses all its blocks; those with two readings of a row are read twice.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vlmo": ("itm", "pairs", {"negatives": "hard"}),
    "vilt": ("itm", "pairs", {"negatives": "random"}),
    "vit": ("mim", "images", {"image_decoder": {"width": 16, "layers": 2, "heads": 2}}),
    "imagebert": ("mlm", "regions", {}),
    "dual_encoder": ("itc", "pairs", {}),
}


def _config(kind: str, **engine: Any):
    from tests.support.trial import Cell, trial_config

    objective, source_type, keys = KINDS[kind]
    config = trial_config(Cell(objective, kind, source_type, keys))  # type: ignore[arg-type]
    model = config.model.model_copy(update={"dropout" if kind == "imagebert" else "drop_path": 0.2})
    return config.model_copy(update={"model": model, "engine": EngineConfig(precision="float32", **engine)})


def _plain(kind: str, **engine: Any) -> tuple[Gradients, int]:
    """Return the gradient of one step in one process, and the bytes that autograd saved for it."""
    from pipeline.training.collectives import Collectives
    from pipeline.training.deepspeed_engine import prepare_blocks
    from tests.support.trial import begin

    config, saved = _config(kind, **engine), list[int]()
    begun = begin(config, Collectives())
    prepare_blocks(begun.engine.model, config.engine)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        begun.step(begun.batch)
    return begun.engine.gradients(), sum(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_blocks_give_an_equal_gradient(kind: str) -> None:
    (expected, all_bytes), (got, fewer_bytes) = _plain(kind), _plain(kind, activation_checkpointing=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert fewer_bytes < 0.5 * all_bytes


def _ranked(layouts: list[dict[str, Any]]) -> list[tuple[Gradients, Gradients]]:
    """Return the gradients of two VLMo steps for every layout; ZeRO 3 traces the first and follows it in the second."""
    from pipeline.data.order import share
    from pipeline.data.storage import Storage
    from pipeline.training.collectives import Collectives
    from pipeline.training.health import ExecutionOrderCheck
    from pipeline.training.stages import Stage, build_stage_model
    from tests.support.engines import build_engine
    from tests.support.trial import VOCABULARY, invented_batch

    collectives, results = Collectives(), []
    for layout in layouts:
        config = _config("vlmo", **layout)
        size = config.stages[0].global_batch_size
        model = build_stage_model(Stage(config, 0), Storage(), VOCABULARY)
        check = ExecutionOrderCheck(collectives, every=1)
        check.on_model_built(model)
        built, gradients = build_engine(config, model=model), []
        for number in range(2):
            rows = slice(*share(size, collectives.rank, collectives.world_size))
            check.before_step(number)
            built.step(invented_batch(config.model, "pairs", number, size).rows(rows))
            check.after_backward(number)
            gradients.append(built.engine.gradients())
            built.engine.step(1e-3)
        results.append((gradients[0], gradients[1]))
        built.engine.close()
    return results


def test_recomputed_blocks_give_an_equal_gradient_on_ranks() -> None:
    layouts = [
        *({"zero_stage": 1}, {"zero_stage": 1, "activation_checkpointing": True}),
        {"zero_stage": 3, "activation_checkpointing": True, "micro_batch_size": 3},
        {"zero_stage": 3, "activation_checkpointing": True, "offload_optimizer": True, "offload_parameters": True},
    ]
    expected, *others = run_ranks(_ranked, 2, layouts)[0]
    for layout, got in zip(layouts[1:], others, strict=True):
        for number, allowed in enumerate((TOLERANCE, 100 * TOLERANCE)):  # weights differ in the second step
            worst = max(relative_errors(expected[number], got[number]).values())
            assert worst <= allowed, (layout, number, worst)


def _compiled() -> tuple[Gradients, Gradients, dict[str, int], dict[str, int]]:
    """Return a ViT's gradient without and with compiled blocks, the compiled graphs, and the graph breaks."""
    from torch._dynamo.utils import counters

    expected, got = _plain("vit")[0], _plain("vit", compile=True)[0]
    return expected, got, dict(counters["stats"]), dict(counters["graph_break"])


@pytest.mark.slow
def test_compiled_blocks_give_the_gradient_without_breaks() -> None:
    expected, got, compiled, broken = run_ranks(_compiled, 1)[0]
    assert compiled["unique_graphs"] > 0
    assert broken == {}
    assert max(relative_errors(expected, got).values()) <= TOLERANCE
