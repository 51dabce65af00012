"""Contract C2: one global batch has one gradient, for every number of ranks, micro-batch size and ZeRO stage."""

import os
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig, SourceType
from pipeline.data.batch import Batch
from pipeline.data.order import share
from pipeline.training.engine import learning_rate
from tests.support.engines import build_engine, gradients_and_losses, tiny_model
from tests.support.gradients import TOLERANCE, relative_errors
from tests.support.ranks import run_ranks
from tests.support.tiny_model import tiny_config
from tests.support.trial import cells, invented_batch, tiny_run

Result = tuple[dict[str, Tensor], dict[str, float]]  # gradients, losses


class Case(NamedTuple):
    """A stage of a tiny run with noise and global batches of `size` examples."""

    kind: str
    source_type: SourceType
    objectives: dict[str, Any]
    size: int
    stage: dict[str, Any] = {}  # noqa: RUF012

    def config(self, engine: dict[str, Any]) -> RunConfig:
        noise = {} if self.kind == "imagebert" else {"drop_path": 0.1}
        keys = {"negatives": "hard" if self.kind == "vlmo" else "random", "global_batch_size": self.size, **self.stage}
        return tiny_run(self.kind, self.source_type, self.objectives, noise, engine, **keys)

    def batch(self, config: RunConfig, rank: int, world_size: int) -> Batch:
        """Return a rank's examples, padded to their own maximum as the loader does.

        Every second pair repeats the image before it, which must not become a negative; the first ranks have fewer
        regions than the others.
        """
        batch = invented_batch(config.model, self.source_type, 1, self.size)
        if batch.region_keep is not None:
            batch.region_keep[:4, -1] = False
        else:
            batch = replace(batch, image_id=torch.arange(len(batch)) // 2 * 2)
        rows, lengths = batch.rows(slice(*share(len(batch), rank, world_size))), dict[str, int]()
        if rows.region_keep is not None:
            names = ("region_features", "region_location", "region_keep", "region_class", "region_hidden")
            lengths = dict.fromkeys(names, int(rows.region_keep.sum(dim=1).max()))
        elif rows.image_size is not None:
            height, width = rows.image_size.max(dim=0).values.tolist()
            rows = replace(rows, image=rows.image[:, :height, :width])
            lengths = dict.fromkeys(("text", "text_keep", "masked_text"), int(rows.text_keep.sum(dim=1).max()))
            lengths["visible_patches"] = int((rows.visible_patches >= 0).sum(dim=1).max())
        return replace(rows, **{name: getattr(rows, name)[:, :length] for name, length in lengths.items()})


# With `every: 4`, many micro-batches of three examples hold none that MIM reads.
EVERY_FOURTH: dict[str, Any] = {"itc": {}, "itm": {"every": 2}, "mlm": {}, "mim": {"every": 4}}
REGIONS: dict[str, Any] = {"itm": {"every": 2}, "mlm": {}, "moc": {}, "mrfr": {"weight": 0.1}}
SHAPED: dict[str, Any] = {"itm": {}, "wpa": {"weight": 0.1}, "mlm": {}, "mim": {"every": 2}}
CASES = {
    "48 pairs": Case("vlmo", "pairs", EVERY_FOURTH, 48),
    # 10 examples: neither 3 ranks nor micro-batches of 2 divide it.
    "regions": Case("imagebert", "regions", REGIONS, 10),
    "shaped images": Case("vilt", "pairs", SHAPED, 12, {"image_target": "mean_colour"}),
    "questions": Case("vlmo", "questions", {"vqa": {}}, 10),
    "statements": Case("vlmo", "statements", {"nlvr2": {}}, 10),
    "labelled": Case("vlmo", "labelled", {"classification": {}}, 10),
}
# An objective that no case has is trained alone, by the last kind of model that learns it.
ALONE = {cell.objective: Case(cell.kind, cell.source_type, {cell.objective: {}}, 12) for cell in cells()}
CASES |= {name: case for name, case in ALONE.items() if not any(name in other.objectives for other in CASES.values())}
TINY_STAGES = {stage.name: number for number, stage in enumerate(tiny_config().stages)}
# Ranks and micro-batch size -> engines. All cases run on the first engine of a layout, the 48 pairs on every one.
LAYOUTS: dict[tuple[int, int | None], list[dict[str, Any]]] = {
    (1, 5): [{"zero_stage": 2}, {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}],
    (2, 3): [{"zero_stage": 3}, {"zero_stage": 1}, *({"zero_stage": n, "offload_optimizer": True} for n in (2, 3))],
    (3, None): [{"zero_stage": 1}, {"zero_stage": 0}, {"zero_stage": 1, "offload_optimizer": True}],
    (3, 2): [{"zero_stage": 2}],
    (5, 2): [{"zero_stage": 3}, {"zero_stage": 2}],
}


def _results(names: list[str], plain: bool, engines: list[dict[str, Any]]) -> list[dict[str, Result]]:
    def result(name: str, engine: dict[str, Any]) -> Result:
        if name in TINY_STAGES:
            return gradients_and_losses(tiny_config(**engine), TINY_STAGES[name], plain)
        return gradients_and_losses(CASES[name].config(engine), 0, plain, CASES[name].batch)

    chosen = [names, *[["48 pairs"]] * (len(engines) - 1)]
    return [{name: result(name, engine) for name in some} for some, engine in zip(chosen, engines, strict=True)]


@pytest.fixture(scope="module")
def expected() -> dict[str, Result]:
    return run_ranks(_results, 1, [*TINY_STAGES, *CASES], True, [{}])[0][0]


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size"),
    [pytest.param(*layout, marks=[pytest.mark.slow] if layout[0] > 3 else []) for layout in LAYOUTS],
)
def test_gradient_equals_one_process(expected, world_size, micro_batch_size):
    names = ["48 pairs"] if world_size == 5 else [*TINY_STAGES, *CASES]
    engines = [{"micro_batch_size": micro_batch_size, **engine} for engine in LAYOUTS[world_size, micro_batch_size]]
    for engine, results in zip(engines, run_ranks(_results, world_size, names, False, engines)[0], strict=True):
        for name, (gradients, losses) in results.items():
            # Word-patch alignment is a difference of distances, which may be near 0.
            assert losses == pytest.approx(expected[name][1], rel=1e-5, abs=1e-7), (name, engine)
            errors = relative_errors(expected[name][0], gradients)
            worst = max(errors, key=errors.__getitem__)
            assert errors[worst] <= TOLERANCE, (name, engine, worst, errors[worst])


def _losses(steps: int) -> list[list[float]]:
    """Return the losses of `steps` steps and the last gradient norm, for each ZeRO stage."""
    results = []
    for zero_stage in range(4):
        built = build_engine(tiny_config(global_batch_size=16, zero_stage=zero_stage), 2)
        rates = [learning_rate(step, steps, built.stage.optimizer) for step in range(steps)]
        losses = [built.train([step], rate)[0] for step, rate in enumerate(rates)]
        results.append([*losses, float(built.engine.gradient_norm)])
        built.engine.close()
    return results


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("ranks", "steps", "with_norm"), [((2, 3), 20, True), ((1, 2, 3, 4), 5, False)])
def test_losses_are_equal_for_every_number_of_ranks_and_zero_stage(ranks, steps, with_norm):
    steps = 100 if "MOME_LONG_RUNS" in os.environ else steps  # half an hour
    results = [losses for n in ranks for losses in run_ranks(_losses, n, steps, seconds=3600.0)[0]]
    end = None if with_norm else -1
    for number, losses in enumerate(results):
        place = f"{ranks[number // 4]} ranks, ZeRO {number % 4}"
        assert losses[:end] == pytest.approx(results[0][:end], rel=1e-5), place


def _updates(zero_stage: int) -> list[dict[str, Tensor]]:
    """Return the change of each trained parameter in one step of the vision stage, for two multipliers."""
    updates = []
    for factor in (1.0, 20.0):
        config = tiny_config({"head_lr_multiplier": factor}, zero_stage=zero_stage)
        model = tiny_model(config)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        built = build_engine(config, model=model)
        built.train([0])
        after = built.engine.weights() or {}
        updates.append({name: after[name] - before[name] for name in before.keys() & after.keys()})
        built.engine.close()
    return updates


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (2, 2), (2, 3)])
def test_head_lr_multiplier_scales_the_heads_alone(world_size: int, zero_stage: int) -> None:
    plain, scaled = run_ranks(_updates, world_size, zero_stage)[0]
    heads = {name for name in plain if name.startswith("mim_head") or name == "image_embedding.mask"}
    assert len(heads) >= 2
    expected = {name: update * (20.0 if name in heads else 1.0) for name, update in plain.items()}
    torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-6)


def _itc_gradients() -> list[dict[str, Tensor]]:
    """Return the gradients of ITC with this project's gathers and with those of VLMo's release."""
    values = tiny_config().model_dump(mode="json")
    values["stages"] = [values["stages"][2] | {"objectives": {"itc": {}}}]
    configs = [validate(values | {"reproduce_vlmo_release": released}, "tiny") for released in (False, True)]
    return [gradients_and_losses(config)[0] for config in configs]


def test_trap_01_released_itc_gradient_is_half_on_two_ranks() -> None:
    """The release does not differentiate gathered features: on W ranks they get 1 / W of the gradient."""
    ours, released = run_ranks(_itc_gradients, 2)[0]
    doubled = {name: gradient if "log_scale" in name else 2 * gradient for name, gradient in released.items()}
    torch.testing.assert_close(doubled, ours, rtol=1e-4, atol=1e-7)
