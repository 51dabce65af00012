"""ViLT's objectives in a step: word-patch alignment over ITM's pairs, and masked patches with their text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.objectives.itm import matched_examples
from pipeline.objectives.mim import MIM
from pipeline.objectives.wpa import WPA, wpa_loss
from pipeline.training.collectives import Collectives
from pipeline.training.stages import Stage, build_stage_model
from pipeline.training.step import TrainingStep
from tests.support.gradients import PlainEngine
from tests.support.trial import VOCABULARY, invented_batch, tiny_section

ROWS = 8


@pytest.fixture(scope="module")
def collectives() -> Iterator[Collectives]:
    alone = Collectives()
    yield alone
    alone.close()


def run_config(objectives: dict[str, Any], **stage: Any) -> RunConfig:
    values = {
        "name": "test",
        "model": tiny_section("vilt").model_dump(),
        "sources": {"pairs": {"shards": "invented"}},
        "data": {"streams": 1},
        "stages": [
            {
                "name": "pairs",
                "sources": {"pairs": 1.0},
                "objectives": objectives,
                "negatives": "random",
                "steps": 2,
                "global_batch_size": ROWS,
                "max_text_length": 12,
                **stage,
            }
        ],
        "engine": {"precision": "float32"},
    }
    return validate(values, "test")


def step_of(config: RunConfig, collectives: Collectives) -> TrainingStep:
    stage = config.stages[0]
    engine = PlainEngine(build_stage_model(Stage(config, 0), Storage(), VOCABULARY), stage.optimizer)
    return TrainingStep(engine, Stage(config, 0), collectives)


def batch_of(config: RunConfig) -> Batch:
    return invented_batch(config.model, "pairs", 1, ROWS)


def test_wpa_reads_the_forward_of_itm(collectives: Collectives) -> None:
    config = run_config({"itm": {}, "wpa": {"weight": 0.1}})
    step, batch = step_of(config, collectives), batch_of(config)
    read: list[dict[str, Any]] = []
    model = step.engine.model
    model.register_forward_hook(lambda module, given, outputs: read.append({"passes": given[0], "outputs": outputs}))
    losses = step(batch)
    assert [set(each["passes"]) for each in read] == [{"pair"}]
    found = read[0]["outputs"]["pair"]
    matched = matched_examples(batch, config.stages[0])
    aligned = {name: found[name] for name in ("words", "patches", "words_keep", "patches_keep")}
    torch.testing.assert_close(losses["wpa"], wpa_loss(**aligned, matched=matched).detach() / ROWS)
    swapped = read[0]["passes"]["pair"].image != batch.image
    assert torch.equal(swapped.flatten(1).any(dim=1), ~matched)
    torch.testing.assert_close(losses["loss"], losses["itm"] + 0.1 * losses["wpa"])


def test_masked_patches_are_read_with_their_text(collectives: Collectives) -> None:
    config = run_config({"mim": {}}, image_target="mean_colour")
    term, batch = step_of(config, collectives).objectives["mim"], batch_of(config)
    assert isinstance(term, MIM)
    one = term.forwards(batch)["hidden"]
    assert one.text is batch.text
    assert int(term.count(batch)) == int((batch.patch_positions >= 0).sum())
    size, colours = config.model.patch_size, torch.zeros_like(batch.patch_positions)
    for row in range(ROWS):
        columns = int(batch.image_size[row, 1]) // size
        for place, position in enumerate(batch.patch_positions[row].tolist()):
            if position < 0:
                continue
            down, across = divmod(position, columns)
            patch = batch.image[row, size * down :, size * across :][:size, :size]
            red, green, blue = (patch.float().mean(dim=(0, 1)).long() // 32).tolist()
            colours[row, place] = 64 * red + 8 * green + blue
    confident = 50.0 * torch.nn.functional.one_hot(colours, 512)
    assert term.loss({"hidden": {"mim": confident}}, batch) < 1e-3


def test_padding_of_masked_patches_changes_no_loss(collectives: Collectives) -> None:
    for target in ("mean_colour", "pixels"):
        config = run_config({"mim": {}}, image_target=target)
        batch = batch_of(config)
        longer = replace(batch, patch_positions=torch.nn.functional.pad(batch.patch_positions, (0, 2), value=-1))
        losses = [step_of(config, collectives)(each)["mim"] for each in (batch, longer)]
        torch.testing.assert_close(losses[0], losses[1])


def test_wpa_without_examples_has_a_gradient(collectives: Collectives) -> None:
    config = run_config({"itm": {}, "wpa": {}})
    step = step_of(config, collectives)
    term = step.objectives["wpa"]
    assert isinstance(term, WPA)
    batch = batch_of(config).rows(slice(0, 0))
    outputs = step.engine({"pair": term.fusion_forward(batch, "pair", "itm", "alignment")})
    loss = term.loss(outputs, batch)
    loss.backward()
    assert loss == 0
