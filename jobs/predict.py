"""`mome predict` and `mome explain`: a checkpoint's predictions for given images and texts, and how it aligns words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL.PngImagePlugin import PngInfo

from jobs.caller import Caller
from jobs.configs import source_types
from jobs.output import write_output
from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import MODEL_SECTIONS, RunConfig
from pipeline.data.contents.images import decode
from pipeline.data.contents.text import Tokenizer
from pipeline.data.quarantine import BadSample
from pipeline.data.storage import NotFound, Storage
from pipeline.evaluation.explain import (
    Condition,
    ExplainedWord,
    explain,
    explanation_html,
    explanation_png,
    explanation_subject,
    untrained_notes,
)
from pipeline.inference import build_trained_model, load_model, load_usable_weights
from pipeline.objectives import modules_for
from pipeline.pages.page import signature

FORMATS = (".html", ".png")


def predict(
    checkpoint: str,
    image: str | None,
    second_image: str | None,
    text: str | None,
    top: int = 5,
    caller: Caller = Caller(),
) -> dict[str, Any]:
    """Return probabilities by name, as `mome predict --json` prints them; images are paths or URLs.

    Raises ConfigError when the checkpoint predicts nothing from these inputs, CheckpointError for a folder without
    complete weights, DataError for an unreadable image.
    """
    if second_image is not None and image is None:
        raise ConfigError("--second-image is given without --image; give the first image with --image")
    model = load_model(checkpoint, caller.store())
    images = [url for url in (image, second_image) if url is not None]
    return model.predict(images, text, top) | {"stage": model.stage.name, "checkpoint": model.url}


def explain_checkpoint(checkpoint: str, image: str, text: str, out: str, caller: Caller = Caller()) -> dict[str, Any]:
    """Draw the alignment of the words of `text` with the patches of `image` to `out`; return it as numbers.

    `image` and `out` are paths or URLs. Raises ConfigError for a kind of model without word-patch alignment and for an
    unknown suffix of `out`, CheckpointError for a folder without finished weights, DataError for an unreadable image.
    """
    if not out.endswith(FORMATS):
        raise ConfigError(f"--out {out}: expected a name that ends in {' or '.join(FORMATS)}")
    storage = caller.store()
    weights = load_usable_weights(storage, checkpoint.rstrip("/"))
    config = weights.config
    model = build_trained_model(weights)
    if modules_for(model, "wpa", "pairs") is None:
        able = ", ".join(kind for kind in MODEL_SECTIONS if source_types("wpa", kind))
        raise ConfigError(
            f"{checkpoint}: a model of kind '{config.model.kind}' does not read words and patches together; "
            f"give a checkpoint of one that does ({able})"
        )
    explanation = explain(
        model,
        Tokenizer.from_vocabulary(weights.vocabulary, config.tokenizer.lowercase),
        _read_image(storage, config, image),
        text,
        config.stage_named(weights.stage).max_text_length,
    )
    notes = untrained_notes(config, weights.stage)
    heading = f"{weights.url}, stage {weights.stage}, step {weights.step}"
    if Path(out).suffix == ".html":
        drawing = explanation_html(explanation, text, heading, notes).encode()
    else:
        buffer, info = io.BytesIO(), PngInfo()
        info.add_text("Software", signature(explanation_subject(explanation, text, heading)))
        explanation_png(explanation, text, heading, notes).save(buffer, "PNG", optimize=True, pnginfo=info)
        drawing = buffer.getvalue()
    write_output(storage, out, drawing, "--out")
    words = [_word_json(word) for word in explanation.words]
    return {"out": out, "distance": explanation.distance, "notes": notes, "words": words}


def _read_image(storage: Storage, config: RunConfig, url: str) -> np.ndarray:
    try:
        return decode(storage.read(url), config.data.max_pixels)
    except NotFound as error:
        raise ConfigError(f"--image {url}: no such file; give the path or URL of a JPEG, PNG or WebP") from error
    except BadSample as bad:
        raise DataError(f"--image {url}: {bad}; give a JPEG, PNG or WebP") from bad


def _word_json(word: ExplainedWord) -> dict[str, Any]:
    row, column = divmod(int(word.heat.argmax()), word.heat.shape[1])
    return {
        "word": word.word,
        "hottest_patch": {"row": row, "column": column, "share": word.heat.max().item()},
        "with_image": _condition_json(word.with_image),
        "without_image": _condition_json(word.without_image),
    }


def _condition_json(condition: Condition) -> dict[str, Any]:
    guesses = [{"word": guess.word, "probability": guess.probability} for guess in condition.guesses]
    return {"guesses": guesses, "truth_probability": condition.truth_probability}
