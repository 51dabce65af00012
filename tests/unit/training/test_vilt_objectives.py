"""ViLT's objectives in a step: word-patch alignment over ITM's pairs, and masked patches with their text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pipeline.objectives.itm import matched_examples
from pipeline.objectives.mim import MIM
from pipeline.objectives.wpa import WPA, wpa_loss
from pipeline.training.collectives import Collectives
from tests.support.trial import ROWS, TrialState, begin, invented_batch, tiny_run


def trial(collectives: Collectives, objectives: dict[str, Any], **stage: Any) -> TrialState:
    """Begin a trial on a batch in which every example is another one."""
    config = tiny_run("vilt", "pairs", objectives, negatives="random", **stage)
    return replace(begin(config, collectives), batch=invented_batch(config.model, "pairs", 1, ROWS))


def test_wpa_reads_the_forward_of_itm(collectives: Collectives) -> None:
    begun = trial(collectives, {"itm": {}, "wpa": {"weight": 0.1}})
    read: list[Any] = []
    begun.engine.model.register_forward_hook(lambda module, arguments, outputs: read.append(outputs))
    losses = begun.step(begun.batch)
    (outputs,) = read
    matched = matched_examples(begun.batch, begun.step.stage.config)
    aligned = {name: outputs["pair"][name] for name in ("words", "patches", "words_keep", "patches_keep")}
    torch.testing.assert_close(losses["wpa"], wpa_loss(**aligned, matched=matched).detach() / ROWS)
    swapped = begun.engine.forwards["pair"].image != begun.batch.image
    assert torch.equal(swapped.flatten(1).any(dim=1), ~matched)
    torch.testing.assert_close(losses["loss"], losses["itm"] + 0.1 * losses["wpa"])


def test_masked_patches_are_read_with_their_text(collectives: Collectives) -> None:
    begun = trial(collectives, {"mim": {}}, image_target="mean_colour")
    mim, batch = begun.step.objectives["mim"], begun.batch
    assert isinstance(mim, MIM)
    assert batch.patch_positions is not None
    assert mim.forwards(batch)["hidden"].text is batch.text
    assert int(mim.count(batch)) == int((batch.patch_positions >= 0).sum())
    size, colours = begun.engine.model.config.patch_size, torch.zeros_like(batch.patch_positions)
    for row in range(ROWS):
        columns = int(batch.image_size[row, 1]) // size
        for place, position in enumerate(batch.patch_positions[row].tolist()):
            if position >= 0:
                down, across = divmod(position, columns)
                patch = batch.image[row, size * down :, size * across :][:size, :size]
                red, green, blue = (patch.float().mean(dim=(0, 1)).long() // 32).tolist()
                colours[row, place] = 64 * red + 8 * green + blue
    confident = 50.0 * torch.nn.functional.one_hot(colours, 512)
    assert mim.loss({"hidden": {"mim": confident}}, batch) < 1e-3


def test_wpa_without_examples_has_a_gradient(collectives: Collectives) -> None:
    begun = trial(collectives, {"itm": {}, "wpa": {}})
    wpa, none = begun.step.objectives["wpa"], begun.batch.rows(slice(0, 0))
    assert isinstance(wpa, WPA)
    loss = wpa.loss(begun.engine({"pair": begun.step.objectives["itm"].fusion_forward(none, "pair")}), none)
    loss.backward()
    assert loss == 0
