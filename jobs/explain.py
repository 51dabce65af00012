"""`mome explain`: a checkpoint's reading of one picture with one text, as a page or a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from jobs.caller import Caller
from jobs.objectives import source_types
from jobs.output import write_output
from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import MODEL_SECTIONS
from pipeline.data.contents.images import decode
from pipeline.data.contents.text import Tokenizer
from pipeline.data.quarantine import BadSample
from pipeline.evaluation.explain import (
    Condition,
    ExplainedWord,
    Explanation,
    explain,
    explanation_html,
    explanation_png,
    explanation_subject,
    untrained_notes,
)
from pipeline.inference import build_trained_model, load_usable_weights
from pipeline.pages.page import signature

FORMATS = (".html", ".png")


def explain_checkpoint(checkpoint: str, image: str, text: str, out: str, caller: Caller = Caller()) -> dict[str, Any]:
    """Write what a run's or a stage's weights see in `image` with `text` to `out`; returns the same as numbers.

    `image` and `out` are paths or URLs. Raises ConfigError for a kind of model that aligns no words, or another
    ending of `out`; CheckpointError for a folder without finished weights; DataError for a picture or text that
    cannot be read.
    """
    if not out.endswith(FORMATS):
        raise ConfigError(f"--out {out}: expected a name that ends in {' or '.join(FORMATS)}")
    storage = caller.store()
    weights = load_usable_weights(storage, checkpoint.rstrip("/"))
    config = weights.config
    stage = config.stage_named(weights.stage)
    model = build_trained_model(weights)
    if model.modules_for("wpa", "pairs") is None:
        able = ", ".join(kind for kind in MODEL_SECTIONS if source_types("wpa", kind))
        raise ConfigError(
            f"{checkpoint}: a model of kind '{config.model.kind}' does not read words and patches together; "
            f"give a checkpoint of one that does ({able})"
        )
    try:
        picture = decode(storage.read(image), config.data.max_pixels)
    except BadSample as bad:
        raise DataError(f"--image {image}: {bad}; give a JPEG, PNG or WebP") from bad
    found = explain(
        model,
        Tokenizer.from_vocabulary(weights.vocabulary, weights.config.tokenizer.lowercase),
        picture,
        text,
        stage.max_text_length,
    )
    notes = untrained_notes(config, weights.stage)
    heading = f"{weights.url}, stage {weights.stage}, step {weights.step}"
    write_output(storage, out, _drawn(found, text, heading, notes, Path(out).suffix), "--out")
    return {"out": out, "distance": found.distance, "notes": notes, "words": [_word(each) for each in found.words]}


def _drawn(found: Explanation, text: str, heading: str, notes: list[str], suffix: str) -> bytes:
    if suffix == ".html":
        return explanation_html(found, text, heading, notes).encode()
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("Software", signature(explanation_subject(found, text, heading)))
    explanation_png(found, text, heading, notes).save(buffer, "PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def _word(word: ExplainedWord) -> dict[str, Any]:
    row, column = divmod(int(word.heat.argmax()), word.heat.shape[1])
    return {
        "word": word.word,
        "hottest_patch": {"row": row, "column": column, "share": word.heat.max().item()},
        "with_image": _condition(word.with_image),
        "without_image": _condition(word.without_image),
    }


def _condition(condition: Condition) -> dict[str, Any]:
    guesses = [{"word": guess.word, "probability": guess.probability} for guess in condition.guesses]
    return {"guesses": guesses, "truth_probability": condition.truth_probability}
