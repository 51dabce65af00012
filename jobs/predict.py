"""`mome predict`: what a checkpoint says of pictures and a text, of everything that its stage was trained for."""

from __future__ import annotations

from typing import Any

import numpy as np

from jobs.caller import Caller
from jobs.evaluate import model_of, weights_to_score
from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.images import decode
from pipeline.data.contents.text import Tokenizer
from pipeline.data.quarantine import BadSample
from pipeline.data.storage import NotFound, Storage
from pipeline.evaluation.prediction import Given, Predictor


def predict(
    checkpoint: str,
    image: str | None,
    second_image: str | None,
    text: str | None,
    top: int = 5,
    caller: Caller = Caller(),
) -> dict[str, Any]:
    """Probabilities by name, as `mome predict --json` prints them; pictures are paths or URLs.

    Raises ConfigError when the checkpoint predicts nothing from what is given, CheckpointError for a folder without
    finished weights, DataError for a picture that cannot be read.
    """
    if second_image is not None and image is None:
        raise ConfigError("--second-image is given without --image; give the first picture with --image")
    storage = caller.store()
    weights = weights_to_score(storage, checkpoint.rstrip("/"))
    stage = weights.config.stage_named(weights.stage)
    pictures = tuple(_picture(storage, weights.config, url) for url in (image, second_image) if url is not None)
    tokenizer = Tokenizer.from_vocabulary(weights.vocabulary, weights.config.tokenizer.lowercase)
    predictor = Predictor(model_of(weights), tokenizer, weights.config, stage, weights.choices, top)
    return predictor(Given(pictures, text)) | {"stage": stage.name, "checkpoint": weights.url}


def _picture(storage: Storage, config: RunConfig, url: str) -> np.ndarray:
    try:
        return decode(storage.read(url), config.data.max_pixels)
    except NotFound as error:
        raise ConfigError(f"--image {url}: no such file; give the path or URL of a JPEG, PNG or WebP") from error
    except BadSample as bad:
        raise DataError(f"--image {url}: {bad}; give a JPEG, PNG or WebP") from bad
