"""Python API: load trained weights and use them, without the command line or Ray.

    import mome

    model = mome.load("runs/demo")                           # a run, a checkpoint, a weights URL or models:/NAME@ALIAS
    images = model.encode_image(["dog.jpg", "cat.jpg"])      # (2, D) unit vectors; one image gives (D,)
    model.similarity(["dog.jpg", "cat.jpg"], ["a dog"])      # (2, 1) cosine similarities
    model.match("dog.jpg", "a dog")                          # probability that image and text match
    model.fill_mask("a [MASK] in the grass", "dog.jpg")      # the best words for each [MASK]
    model.answer("dog.jpg", "what animal is this?")          # the best answers of a model fine-tuned for VQA

MLflow loads registered models through this module as well (`mome register`), so it imports neither typer, rich nor
jinja2. Weights are read without unpickling, and the checksum of every file is verified.

Shapes: N images, M texts, P pairs, D embedding dimensions, H x W pixels.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image as pil
from torch import Tensor

from pipeline.config.errors import ConfigError, DataError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.contents.choices import CLASSES, Choices, answers_with
from pipeline.data.contents.images import decode, resize_for
from pipeline.data.contents.text import MASK, SPECIALS, Tokenizer
from pipeline.data.quarantine import BadSample
from pipeline.data.storage import NotFound, Storage
from pipeline.evaluation.datasets import collate_inputs
from pipeline.evaluation.retrieval import FusedHead, Predictor, contrastive_features, run_forward
from pipeline.models import build_model, skeleton
from pipeline.models.forward import Head
from pipeline.models.model import Model
from pipeline.objectives import head_config, modules_for
from pipeline.training.checkpoint.weights import Weights, load_weights
from pipeline.training.stages import load_matching

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

# A path or URL, an encoded file, or pixels (H, W, 3) uint8.
ImageInput = str | Path | bytes | np.ndarray | Tensor | pil.Image
Images = ImageInput | Sequence[ImageInput]  # several also as an array or tensor (N, H, W, 3) uint8
SeveralTexts = list[str] | tuple[str, ...]  # a `str` is a Sequence[str], too
Texts = str | Sequence[str]
Prediction = dict[str, Any]
BATCH_SIZE = 64


def load(
    source: str | Path,
    device: str | torch.device | None = None,
    storage: Storage | None = None,
    tracking_uri: str | None = None,
) -> TrainedModel:
    """Load weights with their tokenizer and answer lists, ready for inference.

    `source` is the folder or URL of a run (its last finished stage), of a stage, of imported weights or of a
    checkpoint; or `models:/NAME@ALIAS` and `models:/NAME/VERSION` of MLflow's registry at `tracking_uri`, which may be
    a reference 'env:NAME' or 'file:PATH' to it (a folder is 'file:///PATH'; default: MLflow's own setting). `storage`
    holds the credentials of an object store (default: from the environment); the model runs on the GPU by default.
    Raises CheckpointError for incomplete weights, TrackingError for an unknown model.
    """
    storage, url = storage or Storage(), str(source).rstrip("/")
    if url.startswith("models:/"):
        from pipeline.tracking.locations import resolve_uri
        from pipeline.tracking.mlflow_server import download_weights

        server = None if tracking_uri is None else resolve_uri(tracking_uri)
        with tempfile.TemporaryDirectory() as folder:
            weights = replace(load_weights(storage, download_weights(url, Path(folder), server)), url=url)
    else:
        weights = load_weights(storage, url)
    weights = drop_untrained_objectives(weights)
    config, stage = weights.config, weights.config.stage_named(weights.stage)
    model = build_trained_model(weights).to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    tokenizer = Tokenizer(weights.vocabulary or SPECIALS, config.tokenizer.lowercase)
    return TrainedModel(
        model, tokenizer, config.for_stage(stage), stage, weights.choices, storage, weights.url, weights.step
    )


def drop_untrained_objectives(weights: Weights) -> Weights:
    """Return the weights without the objectives whose heads they lack, as imported weights may; log their names."""
    config, stage = weights.config, weights.config.stage_named(weights.stage)
    model = skeleton(config.model, len(weights.vocabulary), head_config(config, config.stages.index(stage)))
    own, stored, source_type = model.state_dict(), weights.tensors, config.source_type_of(stage)
    unfit = [name for name in own if name not in stored or stored[name].shape != own[name].shape]
    lacking = {model.part_of(name) for name in unfit} & set(model.HEAD_PARTS)
    dropped = [o for o in stage.objectives if (modules_for(model, o, source_type) or frozenset()) & lacking]
    if not dropped:
        return weights
    log.warning("%s: no complete head for %s; these objectives are left out", weights.url, ", ".join(dropped))
    objectives = {o: settings for o, settings in stage.objectives.items() if o not in dropped}
    usable = stage.model_copy(update={"objectives": objectives})
    stages = tuple(usable if other is stage else other for other in config.stages)
    return replace(weights, config=config.model_copy(update={"stages": stages}))


def build_trained_model(weights: Weights) -> Model:
    """Build the model of a stage and load its weights; log the parts that are drawn at random."""
    config = weights.config
    index = config.stages.index(config.stage_named(weights.stage))
    model = build_model(config.model, len(weights.vocabulary), head_config(config, index))
    if random := weights.absent - set(model.HEAD_PARTS):
        log.warning("%s: no weights for %s; initialized at random", weights.url, ", ".join(sorted(random)))
    load_matching(model, weights.tensors, weights.stage, weights.absent)
    return model


NO_TEXT, TEXT, MASKED_TEXT = "no text", "a text", f"a text with {MASK}"
# The head of each objective's prediction, and its inputs: in words, the number of images, and the kind of text.
_PREDICTIONS: dict[str, tuple[Head, str, tuple[int, ...], str]] = {
    "vqa": ("answers", "an image and a question", (1,), TEXT),
    "nlvr2": ("nlvr2", "two images and a statement", (2,), TEXT),
    "classification": ("classes", "an image and no text", (1,), NO_TEXT),
    "itc": ("itc", "an image and a text", (1,), TEXT),
    "itm": ("itm", "an image and a text", (1,), TEXT),
    "ranking": ("ranking", "an image and a text", (1,), TEXT),
    "mlm": ("mlm", f"{MASKED_TEXT} and at most one image", (0, 1), MASKED_TEXT),
}


@dataclass(eq=False, repr=False)
class TrainedModel:
    """A stage's model with the tokenizer, config and answer lists that give its outputs their meaning.

    Methods take one item or a sequence, run in evaluation mode, without gradients, and return tensors on the CPU. All
    but `predict` raise ConfigError for an empty sequence; all raise it for what the stage was not trained for and for a
    text without a token, and DataError for an image that cannot be decoded.
    """

    model: Model
    tokenizer: Tokenizer
    config: RunConfig  # with the stage's image size (`for_stage`)
    stage: StageConfig
    choices: Mapping[str, Choices]
    storage: Storage = field(default_factory=Storage)
    url: str = ""
    step: int = 0

    def encode_image(self, images: Images, batch_size: int = BATCH_SIZE) -> Tensor:
        """Return unit vectors (N, D), for one image (D,), in the space shared with `encode_text`."""
        self._require("itc", "embeddings")
        several, is_single = _listed(images, "images")
        predictor = Predictor(self.model, self.tokenizer, batch_size)
        batches = [several[start : start + batch_size] for start in range(0, len(several), batch_size)]
        stacks = (np.stack([self.pixels(image) for image in batch]) for batch in batches)
        vectors = torch.cat([predictor.embed_images(torch.from_numpy(stack)) for stack in stacks])
        return vectors[0] if is_single else vectors

    def encode_text(self, texts: Texts, batch_size: int = BATCH_SIZE) -> Tensor:
        """Return unit vectors (M, D), for one text (D,), in the space shared with `encode_image`."""
        self._require("itc", "embeddings")
        several, is_single = _listed(texts, "texts")
        predictor = Predictor(self.model, self.tokenizer, batch_size)
        vectors = predictor.embed_texts([self.tokenize(text) for text in several])
        return vectors[0] if is_single else vectors

    def similarity(self, images: Images, texts: Texts, batch_size: int = BATCH_SIZE) -> Tensor:
        """Return the cosine of every image with every text, (N, M); one image or one text drops its dimension."""
        of_image, of_text = self.encode_image(images, batch_size), self.encode_text(texts, batch_size)
        return of_image @ (of_text if isinstance(texts, str) else of_text.T)

    def match(
        self,
        images: Images,
        texts: Texts,
        batch_size: int = BATCH_SIZE,
        head: FusedHead | None = None,
    ) -> Tensor:
        """Return the probability that image and text match, from the itm head: 0-d for one pair, else (P,).

        The texts belong to the images at the same index; one image goes with every text, one text with every image. A
        model fine-tuned for ranking returns its ranking scores instead, unless `head` is "itm". Without either
        objective, use `similarity`.
        """
        head = head or ("ranking" if "ranking" in self.stage.objectives else "itm")
        self._require(head, "pair scores")
        several, captions, is_single = self._paired(images, texts, "texts")
        results = []
        for rows in (slice(start, start + batch_size) for start in range(0, len(several), batch_size)):
            token_ids = [self.tokenize(text) for text in captions[rows]]
            pixels = [(self.pixels(image),) for image in several[rows]]
            pairs = collate_inputs(pixels, token_ids, self.tokenizer.pad_id, self.config.model, head)
            scores = run_forward(self.model, pairs)[head].float().cpu()
            results.append(scores if head == "ranking" else (scores[:, 1] - scores[:, 0]).sigmoid())
        matches = torch.cat(results)
        return matches[0] if is_single else matches

    @overload
    def answer(self, images: ImageInput, questions: str, top_k: int = 5) -> dict[str, float]: ...
    @overload
    def answer(self, images: Images, questions: SeveralTexts, top_k: int = 5) -> list[dict[str, float]]: ...
    @overload
    def answer(self, images: Images, questions: Texts, top_k: int = 5) -> Any: ...
    def answer(self, images: Images, questions: Texts, top_k: int = 5) -> Any:
        """Return the `top_k` most probable answers to a question about an image, the best first, with probabilities.

        Several questions or images give a list; they are paired as `match` pairs texts and images.
        """
        self._require("vqa", "answers")
        several, texts, is_single = self._paired(images, questions, "questions")
        pairs = zip(several, texts, strict=True)
        answers = [dict(self._predict("vqa", (self.pixels(image),), text, top_k)["answers"]) for image, text in pairs]
        return answers[0] if is_single else answers

    @overload
    def fill_mask(self, texts: str, images: ImageInput | None = None, top_k: int = 5) -> list[dict[str, float]]: ...
    @overload
    def fill_mask(
        self, texts: SeveralTexts, images: Images | None = None, top_k: int = 5
    ) -> list[list[dict[str, float]]]: ...
    @overload
    def fill_mask(self, texts: Texts, images: Images | None = None, top_k: int = 5) -> Any: ...
    def fill_mask(self, texts: Texts, images: Images | None = None, top_k: int = 5) -> Any:
        """Return the `top_k` best tokens for each [MASK], with probabilities; for several texts a list of such lists.

        Images are paired with the texts as in `match`; they count only where mlm was trained with images.
        """
        self._require("mlm", "masked words")
        if images is None:
            several, is_single = _listed(texts, "texts")
            words = [self._predict("mlm", (), text, top_k)["words"] for text in several]
        else:
            pictures, several, is_single = self._paired(images, texts, "texts")
            pairs = zip(pictures, several, strict=True)
            words = [self._predict("mlm", (self.pixels(image),), text, top_k)["words"] for image, text in pairs]
        return words[0] if is_single else words

    def predict(self, images: Images = (), text: str | None = None, top_k: int = 5) -> Prediction:
        """Return every prediction that the stage was trained for and that these inputs allow, by name.

        The images, of which there may be none, one or two, are those of a single example.
        Raises ConfigError listing the inputs that each prediction needs, if there is none.
        """
        is_empty = isinstance(images, list | tuple) and not images
        pixels = () if is_empty else tuple(self.pixels(image) for image in _listed(images, "images")[0])
        kind = NO_TEXT if text is None else MASKED_TEXT if MASK in text else TEXT
        trained = [objective for objective in self.stage.objectives if objective in _PREDICTIONS]
        predictions: Prediction = {}
        for objective in trained:
            _, _, counts, text_kind = _PREDICTIONS[objective]
            if len(pixels) in counts and kind == text_kind:
                predictions |= self._predict(objective, pixels, text, top_k)
        if predictions:
            return predictions
        count = {0: "no image", 1: "one image", 2: "two images"}.get(len(pixels), f"{len(pixels)} images")
        needs = "; ".join(f"{objective} needs {_PREDICTIONS[objective][1]}" for objective in trained)
        raise ConfigError(
            f"nothing can be predicted from {count} and {kind}: stage {self.stage.name} was trained for "
            f"{needs or 'objectives without predictions: ' + ', '.join(self.stage.objectives)}"
        )

    def _predict(self, objective: str, pixels: tuple[np.ndarray, ...], text: str | None, top_k: int) -> Prediction:
        """Return the prediction of one objective by name, from inputs as `_PREDICTIONS` lists them."""
        head, stage, positions = _PREDICTIONS[objective][0], self.stage, list[int]()
        if objective == "mlm":
            ids, positions = self.tokenize_masked(text or "")
            pixels = pixels if self.config.source_type_of(stage) == "pairs" else ()
        else:
            ids = [] if text is None else self.tokenize(text)
        images, token_ids = [pixels] if pixels else [], [ids] if ids else []
        inputs = collate_inputs(images, token_ids, self.tokenizer.pad_id, self.config.model, head)
        if objective == "itc":  # the mean cosine of the contrastive heads, from -1 to 1
            of_image = contrastive_features(self.model, replace(inputs, text=None, text_keep=None))
            of_text = contrastive_features(self.model, replace(inputs, image=None, image_size=None))
            return {"similarity": (of_image @ of_text.T).item()}
        if objective == "vqa":  # fails without the names of the head's outputs
            answers = answers_with(self.choices, stage.num_answers, f"stage {stage.name}")
        if positions:
            inputs = replace(inputs, mask_positions=torch.tensor([positions]))
        output = run_forward(self.model, inputs)[head][0].float().cpu()
        if objective == "ranking":
            return {"ranking": output.item()}
        if objective == "vqa":
            return {"answers": _top(output.sigmoid(), answers, top_k)}
        probabilities = output.softmax(dim=-1)
        if objective == "mlm":
            return {"words": [_top(row, self.tokenizer.tokens, top_k) for row in probabilities]}
        if objective == "classification":
            classes, numbers = self.choices.get(CLASSES, ()), [str(number) for number in range(len(probabilities))]
            return {"classes": _top(probabilities, classes if len(classes) == len(numbers) else numbers, top_k)}
        return {"true" if objective == "nlvr2" else "matched": probabilities[1].item()}

    def tokenize_masked(self, text: str) -> tuple[list[int], list[int]]:
        """Return token ids and the positions of the masks, which the tokenizer itself would split into letters."""
        ids, positions = [self.tokenizer.cls_id], []
        for number, piece in enumerate(text.split(MASK)):
            if number:
                positions.append(len(ids))
                ids.append(self.tokenizer.mask_id)
            ids += self.tokenizer.encode(piece, len(piece) + 2).ids[1:-1]
        ids.append(self.tokenizer.sep_id)
        if len(ids) > self.stage.max_text_length:
            raise ConfigError(f"the text has {len(ids)} tokens; the stage reads at most {self.stage.max_text_length}")
        if not positions:
            raise ConfigError(f"the text {text!r} has no {MASK}; write {MASK} in the place of each hidden word")
        return ids, positions

    def pixels(self, image: ImageInput) -> np.ndarray:
        """Return an image as the model reads it, (H, W, 3) uint8. Raises ConfigError or DataError that names it."""
        if isinstance(image, pil.Image):
            image = np.array(image.convert("RGB"))
        elif isinstance(image, Tensor):
            image = image.numpy(force=True)
        elif not isinstance(image, np.ndarray):
            name = "the image" if isinstance(image, bytes) else f"image {image}"
            try:
                data = image if isinstance(image, bytes) else self.storage.read(str(image))
                image = decode(data, self.config.data.max_pixels)
            except NotFound as error:
                raise ConfigError(f"{name}: no such file; give the path or URL of a JPEG, PNG or WebP file") from error
            except BadSample as bad:
                raise DataError(f"{name}: {bad}; give a JPEG, PNG or WebP file") from bad
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ConfigError(f"an image of shape {image.shape}, {image.dtype}; expected (height, width, 3) uint8")
        return resize_for(image, self.config.model)

    def tokenize(self, text: str) -> list[int]:
        """Return token ids [CLS] … [SEP]. Raises ConfigError where no token is left."""
        ids = self.tokenizer.encode(text, self.stage.max_text_length).ids
        if len(ids) <= 2:
            raise ConfigError(f"no token is left of the text {text!r:.60}; give at least one word")
        return ids

    def _paired(self, images: Images, texts: Texts, name: str) -> tuple[Sequence[ImageInput], Sequence[str], bool]:
        """Return an image and a text for each pair, and whether both were single ones. Raises ConfigError.

        A single image goes with every text, and is decoded once; a single text goes with every image.
        """
        pictures, is_one_image = _listed(images, "images")
        sentences, is_one_text = _listed(texts, name)
        if is_one_image and not is_one_text:
            pictures = [self.pixels(pictures[0])] * len(sentences)
        elif is_one_text:
            sentences = [sentences[0]] * len(pictures)
        if len(pictures) != len(sentences):
            raise ConfigError(
                f"{len(pictures)} images and {len(sentences)} {name}: give as many {name} as images, or a single image "
                "or text, which goes with each of the others"
            )
        return pictures, sentences, is_one_image and is_one_text

    def _require(self, objective: str, purpose: str) -> None:
        """Raise ConfigError for a stage without the objective."""
        if objective not in self.stage.objectives:
            raise ConfigError(
                f"{self.url or 'this model'}: {purpose} need objective {objective}, and stage {self.stage.name} was "
                f"trained for {', '.join(self.stage.objectives)}; give the checkpoint of a stage with {objective}"
            )


def _listed(items: Any, name: str) -> tuple[Sequence[Any], bool]:
    """Return images or texts as a sequence, and whether they are a single one. Raises ConfigError for an empty one."""
    is_array = isinstance(items, np.ndarray | Tensor)
    if isinstance(items, str | Path | bytes | pil.Image) or (is_array and items.ndim == 3):
        return [items], True
    several = items if is_array else list(items)
    if len(several) == 0:
        raise ConfigError(f"no {name} are given; give at least one")
    return several, False


def _top(probabilities: Tensor, names: Sequence[str], k: int) -> dict[str, float]:
    best = probabilities.topk(min(k, len(probabilities)))
    return {names[n]: round(p, 6) for n, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}


# MLflow's pyfunc ------------------------------------------------------------------------------------------------------

EMBEDDINGS, MATCHED = ("image_embedding", "text_embedding", "similarity"), "matched"


def pyfunc_outputs(stage: StageConfig, url: str) -> tuple[str, ...]:
    """Return the columns of a registered model's answers. Raises ConfigError if these weights give none."""
    columns = (*(EMBEDDINGS if "itc" in stage.objectives else ()), *((MATCHED,) if "itm" in stage.objectives else ()))
    if not columns:
        raise ConfigError(
            f"{url}: stage {stage.name} was trained for {', '.join(stage.objectives)}; retrieval embeddings need "
            "itc, matching scores need itm. Give a stage that has one of them"
        )
    return columns


@dataclass(frozen=True)
class PyfuncModel:
    """A trained model behind MLflow's `pyfunc` interface: a data frame in, a data frame out."""

    trained: TrainedModel

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return one row for each row of `model_input`, whose columns are `image` (bytes of a file) and `text`.

        Either may be absent or null. `image_embedding` and `text_embedding` are unit vectors (D,); `similarity`, their
        dot product, and `matched`, a probability, need both. What cannot be computed is null. `params={"itm": False}`
        skips the fusion encoder. Raises DataError naming the row that cannot be read.
        """
        import pandas as pd

        trained, outputs = self.trained, pyfunc_outputs(self.trained.stage, self.trained.url)
        columns = [name for name in outputs if name != MATCHED or (params or {}).get("itm", True)]
        results: dict[str, list[Any]] = {name: [None] * len(model_input) for name in columns}
        for start in range(0, len(model_input), BATCH_SIZE):
            frame = model_input.iloc[start : start + BATCH_SIZE]
            images: dict[int, np.ndarray] = {}  # by row, resized: originals may have many megapixels
            texts: dict[int, str] = {}
            for column, row in itertools.product(("image", "text"), range(start, start + len(frame))):
                value = frame[column].iloc[row - start] if column in frame else None
                if value is None or isinstance(value, float):  # NaN
                    continue
                try:
                    if column == "image":
                        if isinstance(value, str):
                            raise ConfigError(f"the image is the text {value!r:.60}; give the bytes of an image file")
                        images[row] = trained.pixels(bytes(value))
                    else:
                        texts[row] = str(value)
                        trained.tokenize(texts[row])  # fails for a text without a token
                except (ConfigError, DataError) as error:
                    raise DataError(f"row {row}: {error}") from error
            paired = [row for row in images if row in texts]
            if "similarity" in columns:
                image_of = dict(zip(images, trained.encode_image([*images.values()]) if images else (), strict=True))
                text_of = dict(zip(texts, trained.encode_text([*texts.values()]) if texts else (), strict=True))
                for name, vectors in (("image_embedding", image_of), ("text_embedding", text_of)):
                    for row, vector in vectors.items():
                        results[name][row] = vector.tolist()
                for row in paired:
                    results["similarity"][row] = float(image_of[row] @ text_of[row])
            if MATCHED in columns and paired:
                scores = trained.match([images[n] for n in paired], [texts[n] for n in paired], head="itm")
                for row, score in zip(paired, scores.tolist(), strict=True):
                    results[MATCHED][row] = score
        return pd.DataFrame(results, index=model_input.index, dtype=object)


def _load_pyfunc(path: str) -> PyfuncModel:
    return PyfuncModel(load(path))
