"""What a fine-tuned or pretrained model says of given pictures and a text: of everything its stage was trained for.

Shapes: H x W pixels, L tokens, A listed answers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.schema import Objective, RunConfig, StageConfig
from pipeline.data.contents.choices import CLASSES, Choices, answers_with
from pipeline.data.contents.images import resize_for
from pipeline.data.contents.text import CLS, MASK, SEP, Tokenizer
from pipeline.evaluation.datasets import on_device, pass_over
from pipeline.evaluation.retrieval import contrastive_features, eval_mode
from pipeline.models.forward import ForwardInput, Head
from pipeline.models.model import Model

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """What somebody asks about: no, one or two decoded pictures (H, W, 3) uint8, and perhaps a text."""

    pictures: tuple[np.ndarray, ...] = ()
    text: str | None = None

    @property
    def is_masked(self) -> bool:
        return self.text is not None and MASK in self.text

    def __str__(self) -> str:
        text = "no text" if self.text is None else f"a text with {MASK}" if self.is_masked else "a text"
        return f"{('no picture', 'one picture', 'two pictures')[len(self.pictures)]} and {text}"


@dataclass(frozen=True)
class _Ability:
    """What an objective lets a model predict, and what it has to be given for that."""

    needs: str
    serves: Callable[[Given], bool]
    predict: Callable[[Predictor, Given], Prediction]


class Predictor:
    """A model with all that its outputs mean."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        config: RunConfig,
        stage: StageConfig,
        choices: Mapping[str, Choices],
        top: int = 5,
    ):
        self.model, self.tokenizer, self.choices, self.top = model, tokenizer, choices, top
        self.config, self.stage = config.for_stage(stage), stage

    def __call__(self, given: Given) -> Prediction:
        """Every prediction that the stage was trained for and that can be made of what is given.

        Raises ConfigError, saying what the checkpoint predicts from what, when there is none.
        """
        able = {o: ABILITIES[o] for o in self.stage.objectives if o in ABILITIES}
        found: Prediction = {}
        for ability in able.values():
            if ability.serves(given):
                found |= ability.predict(self, given)
        if found:
            return found
        told = "; ".join(f"{objective} needs {ability.needs}" for objective, ability in able.items())
        raise ConfigError(
            f"nothing can be predicted from {given}: stage {self.stage.name} was trained for "
            f"{told or 'nothing that predicts: ' + ', '.join(self.stage.objectives)}"
        )

    # ---- one for each objective

    def answers(self, given: Given) -> Prediction:
        listed = answers_with(self.choices, self.stage.num_answers, f"stage {self.stage.name}")
        odds = self._read(self._fused(given, "answers"))["answers"][0].sigmoid()
        return {"answers": self._best(odds, listed.names)}

    def truth(self, given: Given) -> Prediction:
        return {"true": self._read(self._fused(given, "nlvr2"))["nlvr2"][0].softmax(dim=0)[1].item()}

    def classes(self, given: Given) -> Prediction:
        odds = self._read(self._fused(given, "classes"))["classes"][0].softmax(dim=0)
        listed = self.choices.get(CLASSES)
        named = listed is not None and len(listed) == len(odds)
        return {"classes": self._best(odds, listed.names if named and listed else [str(n) for n in range(len(odds))])}

    def matched(self, given: Given) -> Prediction:
        return {"matched": self._read(self._fused(given, "itm"))["itm"][0].softmax(dim=0)[1].item()}

    def ranking(self, given: Given) -> Prediction:
        return {"ranking": self._read(self._fused(given, "ranking"))["ranking"][0].item()}

    def similarity(self, given: Given) -> Prediction:
        """The mean of the contrastive heads' cosines, -1 … 1."""
        both = self._fused(given, "itc")
        with eval_mode(self.model) as device:
            image, text = (
                contrastive_features(self.model, on_device(one, device))
                for one in (replace(both, text=None, text_keep=None), replace(both, image=None, image_size=None))
            )
        return {"similarity": (image @ text.T).item()}

    def words(self, given: Given) -> Prediction:
        assert given.text is not None
        ids, positions = self.encode_masked(given.text)
        sees = self.config.source_type_of(self.stage) == "pairs"
        one = self._pass(given.pictures if sees else (), ids, "mlm")
        odds = self._read(replace(one, mask_positions=torch.tensor([positions])))["mlm"][0].softmax(dim=1)
        return {"words": [self._best(each, self.tokenizer.tokens) for each in odds]}

    # ---- how

    def encode_masked(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids with [MASK] where the text spells it, which the tokenizer would read as letters; and where."""
        ids = [self.tokenizer.tokens.index(CLS)]
        positions = []
        for number, piece in enumerate(text.split(MASK)):
            if number:
                positions.append(len(ids))
                ids.append(self.tokenizer.mask_id)
            ids += self.tokenizer.encode(piece, len(piece) + 2).ids[1:-1]
        ids.append(self.tokenizer.tokens.index(SEP))
        if len(ids) > self.stage.max_text_length:
            raise ConfigError(f"the text has {len(ids)} tokens; the stage reads at most {self.stage.max_text_length}")
        return ids, positions

    def _fused(self, given: Given, head: Head) -> ForwardInput:
        ids = [] if given.text is None else self.tokenizer.encode(given.text, self.stage.max_text_length).ids
        if given.text is not None and len(ids) <= 2:
            raise ConfigError(f"no token is left of the text {given.text!r}; give at least one word")
        return self._pass(given.pictures, ids, head)

    def _pass(self, pictures: Sequence[np.ndarray], ids: list[int], head: Head) -> ForwardInput:
        resized = tuple(resize_for(picture, self.config.model) for picture in pictures)
        rows = [ids] if ids else []
        return pass_over([resized] if resized else [], rows, self.tokenizer.pad_id, self.config.model, head)

    def _read(self, one: ForwardInput) -> dict[str, Tensor]:
        with eval_mode(self.model) as device:
            outputs = self.model({"only": on_device(one, device)})["only"]
        return {name: value.float().cpu() for name, value in outputs.items()}

    def _best(self, odds: Tensor, names: Sequence[str]) -> dict[str, float]:
        best = odds.topk(min(self.top, len(odds)))
        return {names[n]: round(p, 6) for n, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}


def _is_pair(given: Given) -> bool:
    return len(given.pictures) == 1 and given.text is not None and not given.is_masked


ABILITIES: dict[Objective, _Ability] = {
    "vqa": _Ability("a picture and a text, the question", _is_pair, Predictor.answers),
    "nlvr2": _Ability(
        "two pictures and a text, the statement",
        lambda given: len(given.pictures) == 2 and given.text is not None and not given.is_masked,
        Predictor.truth,
    ),
    "classification": _Ability(
        "a picture and no text", lambda given: len(given.pictures) == 1 and given.text is None, Predictor.classes
    ),
    "itc": _Ability("a picture and a text", _is_pair, Predictor.similarity),
    "itm": _Ability("a picture and a text", _is_pair, Predictor.matched),
    "ranking": _Ability("a picture and a text", _is_pair, Predictor.ranking),
    "mlm": _Ability(
        f"a text with {MASK} and at most one picture",
        lambda given: given.is_masked and len(given.pictures) <= 1,
        Predictor.words,
    ),
}
