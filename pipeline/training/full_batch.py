"""Synthetic batches of maximum size, for estimates and measurements of memory and speed.

Texts have the stage's maximum length, images the model's largest size, and the masking's fractions determine the number
of masked words, patches and regions.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.config.schema import RunConfig, StageConfig, ViLTConfig
from pipeline.data.batch import IGNORED, Batch, BatchBuffer
from pipeline.data.examples.builder import batch_spec
from pipeline.objectives import batch_groups

SPECIAL_TOKENS = 2  # [CLS] and [SEP], which are never masked


def full_batch(
    config: RunConfig, stage: StageConfig, rows: int, vocabulary: int, text_tokens: int | None = None, step: int = 0
) -> Batch:
    """Return a whole global batch of `rows` examples, a function of its arguments alone.

    `text_tokens` is the length of every text (default: the maximum of the stage). Fields without values of their own
    are random numbers, False or 0 by their type.
    """
    config = config.for_stage(stage)
    spec = batch_spec(config, stage, batch_groups(config, stage), rows)
    sizes, model = spec.sizes, config.model
    buffer, random = BatchBuffer(spec), np.random.default_rng(step)

    def positions(count: int, total: int) -> np.ndarray:
        return np.stack([random.permutation(total)[:count] for _ in range(rows)])

    for name, shape, dtype in spec.fields:
        if dtype == np.uint8:
            buffer[name][...] = random.integers(0, 256, shape, dtype=np.uint8)
        elif dtype == np.float32:
            buffer[name][...] = random.random(shape, dtype=np.float32)
        else:
            buffer[name][...] = 0
    values: dict[str, object] = {
        "uid": np.arange(rows),
        "image_id": np.arange(rows),
        "visible_patches": np.arange(sizes.visible_patches),
        "patch_positions": positions(sizes.masked_patches, sizes.visible_patches),
        "patch_replacements": -1,
        "region_keep": True,
        "label": np.arange(rows) % (2 if "second_image" in buffer else stage.num_classes or 2),
    }
    if isinstance(model, ViLTConfig):  # the largest image fills the square of every image only partly
        largest = [side // model.patch_size * model.patch_size for side in (model.image_size, model.longest_side)]
        values |= {"image_size": largest, "second_image_size": largest}
    if "text" in buffer:
        length = min(text_tokens or sizes.text, sizes.text)
        first = min(vocabulary - 1, SPECIAL_TOKENS + 3)
        text = random.integers(first, vocabulary, (rows, sizes.text))
        words = length - SPECIAL_TOKENS
        masked = min(words, 2 * math.ceil(stage.masking.mlm_probability * words))  # as if masked words had two pieces
        at = 1 + positions(masked, words)
        masked_text, mask_positions, labels = text.copy(), np.zeros_like(text), np.full_like(text, IGNORED)
        np.put_along_axis(masked_text, at, first, axis=1)
        mask_positions[:, :masked], labels[:, :masked] = at, np.take_along_axis(text, at, axis=1)
        keep = np.arange(sizes.text) < length
        values |= {"text": text, "text_keep": keep, "masked_text": masked_text}
        values |= {"mask_positions": mask_positions, "mask_labels": labels}
    if "answers" in buffer:  # one answer per question
        answers = np.full(buffer["answers"].shape, -1)
        answers[:, 0] = np.arange(rows) % (stage.num_answers or 2)
        values |= {"answers": answers, "answer_scores": answers >= 0}
    if "region_positions" in buffer:
        masked_regions = positions(sizes.masked_regions, sizes.regions)
        hidden = np.zeros((rows, sizes.regions), dtype=np.bool_)
        np.put_along_axis(hidden, masked_regions, True, axis=1)
        values |= {"region_positions": masked_regions, "region_hidden": hidden}
    for name, value in values.items():
        if name in buffer:
            buffer[name][...] = value
    return buffer.to_batch(step, range(rows))
