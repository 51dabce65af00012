"""Word-patch alignment of a few held-out pairs, small enough for a report. `mome explain` draws any pair, larger."""

from __future__ import annotations

import numpy as np

from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.text import Tokenizer
from pipeline.evaluation.explain import explain, untrained
from pipeline.evaluation.explain_page import panel
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.shown import AlignedCaption, Alignments
from pipeline.models.model import Model
from pipeline.pages.page import thumbnail

ALIGNED = 4  # pictures
HEAT = 112  # pixels of a heat map


def aligned(model: Model, tokenizer: Tokenizer, held_out: HeldOut, config: RunConfig, stage: StageConfig) -> Alignments:
    """The first captions of pictures at even distances; none where the model does not read words and patches together.

    What the weights were never trained for is noted, and shown none the less.
    """
    if model.modules_for("word_patch", "pairs") is None or not len(held_out):
        return Alignments()
    chosen = range(0, len(held_out), -(-len(held_out) // ALIGNED))
    return Alignments(
        [_aligned(model, tokenizer, held_out, number, stage.max_text) for number in chosen],
        untrained(config, stage.name),
    )


def _aligned(model: Model, tokenizer: Tokenizer, held_out: HeldOut, number: int, max_text: int) -> AlignedCaption:
    caption, picture = held_out.captions[number][0], held_out.picture(number).numpy()
    found = explain(model, tokenizer, picture, caption, max_text)
    words = [
        (word.word, thumbnail(np.asarray(panel(found, word)), HEAT), word.heat.max().item()) for word in found.words
    ]
    return AlignedCaption(thumbnail(found.picture.numpy(), HEAT), caption, words)
