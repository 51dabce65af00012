"""`mome predict`: every prediction that a checkpoint's stage was trained for, from images and a text."""

from __future__ import annotations

from typing import Any

from jobs.caller import Caller
from pipeline.config.errors import ConfigError
from pipeline.inference import load_model


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
    complete weights, DataError for an image that cannot be read.
    """
    if second_image is not None and image is None:
        raise ConfigError("--second-image is given without --image; give the first image with --image")
    model = load_model(checkpoint, caller.store())
    images = [url for url in (image, second_image) if url is not None]
    return model.predict(images, text, top) | {"stage": model.stage.name, "checkpoint": model.url}
