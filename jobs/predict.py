"""`mome predict` and `mome explain`: a checkpoint's predictions for given images and texts, and how it aligns words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from jobs.caller import Caller
from jobs.configs import source_types
from jobs.output import write_output
from pipeline.config.errors import ConfigError
from pipeline.config.schema import MODEL_SECTIONS
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.evaluation.explain import (
    explain,
    explanation_html,
    explanation_png,
    explanation_subject,
    untrained_notes,
)
from pipeline.inference import build_trained_model, load_model, load_usable_weights, read_image
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
        Tokenizer(weights.vocabulary or SPECIALS, config.tokenizer.lowercase),
        read_image(image, storage, config.data.max_pixels),
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
    words = []
    for word in explanation.words:
        row, column = divmod(int(word.heat.argmax()), word.heat.shape[1])
        conditions = {
            name: {
                "guesses": [{"word": guess.word, "probability": guess.probability} for guess in condition.guesses],
                "truth_probability": condition.truth_probability,
            }
            for name, condition in (("with_image", word.with_image), ("without_image", word.without_image))
        }
        hottest = {"row": row, "column": column, "share": word.heat.max().item()}
        words.append({"word": word.word, "hottest_patch": hottest, **conditions})
    return {"out": out, "distance": explanation.distance, "notes": notes, "words": words}
