"""A checkpoint as MLflow serves it: pictures and texts in, retrieval embeddings and matching scores out.

The module that a registered model names as its loader (`mome register`): MLflow calls `_load_pyfunc` with the folder of
weights that it holds, as a stage hands them over. Nothing is pickled, and every file's checksum is verified on loading.

Shapes: B rows of the request, D dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs.evaluate import model_of, weights_to_score
from pipeline.config.errors import ConfigError, DataError
from pipeline.data.contents.images import OwnShape, decode, on_one_canvas, resize_for, shape_of
from pipeline.data.contents.text import Tokenizer
from pipeline.data.quarantine import BadSample
from pipeline.data.storage import Storage
from pipeline.evaluation.retrieval import embed_images, embed_texts, fusion_scores
from pipeline.training.checkpoint import Weights

if TYPE_CHECKING:
    import pandas as pd

EMBEDDINGS, MATCHED = ("image_embedding", "text_embedding", "similarity"), "matched"
BATCH = 64  # rows read at once: bounds the memory of a large request


def outputs_of(weights: Weights) -> tuple[str, ...]:
    """The columns that weights can answer with. Raises ConfigError where there are none."""
    objectives = weights.config.stage_named(weights.stage).objectives
    found = (*(EMBEDDINGS if "itc" in objectives else ()), *((MATCHED,) if "itm" in objectives else ()))
    if not found:
        raise ConfigError(
            f"{weights.url}: stage {weights.stage} was trained for {', '.join(objectives)}; retrieval embeddings need "
            "contrastive, matching scores need matching. Give a stage that has one of them"
        )
    return found


class Served:
    """Weights that answer requests of MLflow's `pyfunc`."""

    def __init__(self, weights: Weights):
        self.outputs = outputs_of(weights)
        stage = weights.config.stage_named(weights.stage)
        self._config, self._max_text = weights.config.for_stage(stage), stage.max_text_length
        self._model, self._tokenizer = (
            model_of(weights),
            Tokenizer.from_vocabulary(weights.vocabulary, weights.config.tokenizer.lowercase),
        )
        if torch.cuda.is_available():
            self._model.cuda()

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row for each row of `model_input`, whose columns are `image` (a JPEG, PNG or WebP file's bytes) and `text`.

        Either may be absent or null. `image_embedding` and `text_embedding` are unit vectors (D,) of their column;
        `similarity`, their dot product, and `matched`, a probability, need both. What cannot be told is null.
        `params={"itm": False}` spares the fusion encoder. Raises DataError naming the row that cannot be read.
        """
        import pandas as pd

        matching = MATCHED in self.outputs and (params or {}).get("itm", True)
        parts = [
            self._rows(model_input.iloc[start : start + BATCH], start, matching)
            for start in range(0, len(model_input), BATCH)
        ]
        columns = [name for name in self.outputs if matching or name != MATCHED]
        answers = {name: [value for part in parts for value in part[name]] for name in columns}
        return pd.DataFrame(answers, index=model_input.index, dtype=object)

    def _rows(self, frame: pd.DataFrame, first: int, matching: bool) -> dict[str, list[Any]]:
        """The answers to a batch of the request's rows, the first of which is row `first`."""
        image_rows, pictures = self._pictures(_given(frame, "image"), first)
        text_rows, tokens = self._tokens(_given(frame, "text"), first)
        found: dict[str, list[Any]] = {name: [None] * len(frame) for name in self.outputs}
        if not pictures and not tokens:
            return found
        canvases, sizes = on_one_canvas(pictures) if pictures else (np.zeros((0, 1, 1, 3), np.uint8), np.zeros((0, 2)))
        images, own = torch.from_numpy(canvases), isinstance(shape_of(self._config.model), OwnShape)
        both = [(image_rows.index(row), text_rows.index(row), row) for row in image_rows if row in text_rows]
        if "similarity" in self.outputs:
            image = embed_images(self._model, images) if pictures else torch.zeros(0, 0)
            text = embed_texts(self._model, tokens, self._tokenizer.pad_id) if tokens else torch.zeros(0, 0)
            _put(found["image_embedding"], image_rows, image.tolist())
            _put(found["text_embedding"], text_rows, text.tolist())
            _put(found["similarity"], [row for *_, row in both], [float(image[i] @ text[t]) for i, t, _ in both])
        if matching and both:
            pairs = torch.tensor([(i, t) for i, t, _ in both])
            image_size = torch.from_numpy(sizes) if own else None
            odds = fusion_scores(self._model, images, tokens, self._tokenizer.pad_id, pairs, image_size=image_size)
            _put(found[MATCHED], [row for *_, row in both], odds.sigmoid().tolist())
        return found

    def _pictures(self, column: Sequence[Any], first: int) -> tuple[list[int], list[np.ndarray]]:
        """The rows that have a picture, and these, in the shape that the model reads."""
        rows = [row for row, data in enumerate(column) if data is not None]
        pictures = []
        for row in rows:
            try:
                pictures.append(
                    resize_for(decode(bytes(column[row]), self._config.data.max_pixels), self._config.model)
                )
            except BadSample as bad:
                raise DataError(f"row {first + row}: {bad}; give the bytes of a JPEG, PNG or WebP file") from bad
        return rows, pictures

    def _tokens(self, column: Sequence[Any], first: int) -> tuple[list[int], list[list[int]]]:
        """The rows that have a text, and its tokens, [CLS] … [SEP]."""
        rows = [row for row, text in enumerate(column) if text is not None]
        tokens = [self._tokenizer.encode(str(column[row]), self._max_text).ids for row in rows]
        for row, ids in zip(rows, tokens, strict=True):
            if len(ids) <= 2:
                raise DataError(f"row {first + row}: no token is left of the text {column[row]!r:.60}; give a word")
        return rows, tokens


def _given(frame: pd.DataFrame, name: str) -> list[Any]:
    """A column, None where nothing is given."""
    if name not in frame:
        return [None] * len(frame)
    return [None if isinstance(value, float) or value is None else value for value in frame[name]]  # NaN: not given


def _put(column: list[Any], rows: Sequence[int], values: Sequence[Any]) -> None:
    for row, value in zip(rows, values, strict=True):
        column[row] = value


def _load_pyfunc(path: str) -> Served:
    return Served(weights_to_score(Storage(), path))
