"""The Python API on a tiny model with random weights: each result equals the model's own outputs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.errors import CheckpointError, ConfigError, DataError
from pipeline.config.schema import RunConfig
from pipeline.data.contents.choices import ANSWERS, Choices
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.retrieval import embed_images, embed_texts
from pipeline.inference import TrainedModel, load_model
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.models.vlmo import VLMo
from pipeline.training.checkpoint import save_weights


@pytest.fixture
def trained(model: VLMo, tokenizer: Tokenizer, config: RunConfig) -> TrainedModel:
    return TrainedModel(model, tokenizer, config, config.stages[2], {})


@pytest.fixture
def image(held_out: EvalPairs) -> np.ndarray:
    return held_out.images[0].numpy()


@pytest.fixture
def run(tmp_path: Path, model: VLMo, tokenizer: Tokenizer, config: RunConfig, storage: Storage) -> Path:
    """Return the folder of a run with the weights of its last stage."""
    stored = config.model_dump(mode="json") | {"output": str(tmp_path), "name": "tiny"}
    metadata = {"config": stored, "stage": "vision_language", "step": 4, "absent": []}
    folder = tmp_path / "tiny"
    save_weights(
        storage, f"{folder}/stages/2-vision_language", dict(model.state_dict()), list(tokenizer.tokens), metadata
    )
    return folder


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_loaded_run_encodes_images_and_texts_as_evaluation_does(
    run: Path, model: VLMo, held_out: EvalPairs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    loaded = load_model(run)
    images, captions = [held_out.image(n).numpy() for n in range(5)], [held_out.captions[n][0] for n in range(5)]
    (tmp_path / "2.png").write_bytes(encoded(images[2]))
    inputs = [encoded(images[0]), images[1], str(tmp_path / "2.png"), tmp_path / "2.png", Image.fromarray(images[4])]
    expected = embed_images(model, torch.from_numpy(np.stack([images[n] for n in (0, 1, 2, 2, 4)])))
    torch.testing.assert_close(loaded.encode_images(inputs, batch_size=2), expected)
    rows = [tokens.ids for tokens in tokenizer.encode_batch(captions, 40)]
    torch.testing.assert_close(loaded.encode_texts(captions), embed_texts(model, rows, tokenizer.pad_id))
    assert loaded.url.endswith("/stages/2-vision_language")


def test_pair_predictions_are_the_heads_outputs(
    trained: TrainedModel, model: VLMo, image: np.ndarray, held_out: EvalPairs, tokenizer: Tokenizer
) -> None:
    text = held_out.captions[0][0]
    prediction = trained.predict([image], text)
    assert prediction.keys() == {"similarity", "matched"}
    ids = torch.tensor([tokenizer.encode(text, 40).ids])
    with torch.no_grad():
        vision = model.eval()({"x": ForwardInput(heads=("itc",), image=held_out.images[:1])})["x"]
        language = model({"x": ForwardInput(heads=("itc",), text=ids)})["x"]
        fused = model({"x": ForwardInput(heads=("itm",), image=held_out.images[:1], text=ids)})["x"]["itm"]
    cosines = [(vision[name] @ language[name].T).item() for name in ("itc", "itc_vl")]
    assert prediction["similarity"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert prediction["matched"] == pytest.approx(fused.softmax(dim=1)[0, 1].item(), abs=1e-6)
    scores = trained.score_pairs([image] * 3, [text, "a circle", text], batch_size=2)
    assert scores[[0, 2]].tolist() == pytest.approx([prediction["matched"]] * 2, abs=1e-6)
    assert (trained.encode_images([image]) @ trained.encode_texts([text]).T).item() == pytest.approx(
        prediction["similarity"], abs=1e-6
    )


def test_masked_words_depend_on_the_image(trained: TrainedModel, image: np.ndarray) -> None:
    text = "a large [MASK] circle above a [MASK] square"
    alone, with_image = trained.fill_masks(text, top_k=3), trained.fill_masks(text, image, top_k=3)
    assert [len(words) for words in alone] == [len(words) for words in with_image] == [3, 3]
    assert alone != with_image
    assert trained.predict([image], text, top_k=3) == {"words": with_image}


def test_spelled_mask_becomes_the_mask_token(trained: TrainedModel, tokenizer: Tokenizer) -> None:
    ids, positions = trained.tokenize_masked("a large [MASK] circle")
    plain = tokenizer.encode("a large circle", 40).ids
    assert [ids[p] for p in positions] == [tokenizer.mask_id]
    assert [token for token in ids if token != tokenizer.mask_id] == plain


def test_answers_are_the_listed_ones_by_probability(config: RunConfig, tokenizer: Tokenizer, image: np.ndarray) -> None:
    stage = config.stages[2].model_copy(update={"objectives": {"vqa": None}, "num_answers": 3})
    model = build_model(config.model, tokenizer.size, HeadConfig(answers=3), seed=1)
    trained = TrainedModel(model, tokenizer, config, stage, {ANSWERS: Choices(("yes", "no", "red"))})
    answers = trained.answer(image, "is it red?", top_k=2)
    assert set(answers) < {"yes", "no", "red"}
    assert list(answers.values()) == sorted(answers.values(), reverse=True)
    assert trained.predict([image], "is it red?", top_k=2) == {"answers": answers}


@pytest.mark.parametrize("count", [0, 2])
def test_impossible_prediction_names_the_inputs_needed(trained: TrainedModel, image: np.ndarray, count: int) -> None:
    with pytest.raises(ConfigError, match=r"itc needs an image and a text; itm needs .*mlm needs"):
        trained.predict([image] * count, "a circle")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, image: m.predict([image], "  "), ConfigError, "no token is left"),
        (lambda m, image: m.fill_masks("[MASK] " * 50), ConfigError, "at most 40"),
        (lambda m, image: m.fill_masks("a circle"), ConfigError, r"no \[MASK\]"),
        (lambda m, image: m.answer(image, "what?"), ConfigError, "answers need objective vqa"),
        (lambda m, image: m.score_pairs([image], []), ValueError, "1 images and 0 texts"),
        (lambda m, image: m.encode_images([]), ValueError, "at least one"),
        (lambda m, image: m.encode_images(["no.jpg"]), ConfigError, "no such file"),
        (lambda m, image: m.encode_images([b"no image"]), DataError, "give a JPEG"),
        (lambda m, image: m.encode_images([image[..., 0]]), ConfigError, "expected .height, width, 3. uint8"),
    ],
)
def test_unusable_inputs_are_rejected_with_the_remedy(
    trained: TrainedModel, image: np.ndarray, call: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(trained, image)


def test_stage_without_predictions_is_rejected(trained: TrainedModel, config: RunConfig, image: np.ndarray) -> None:
    vision = TrainedModel(trained.model, trained.tokenizer, config, config.stages[0], {})
    with pytest.raises(ConfigError, match="objectives without predictions: mim"):
        vision.predict([image])
    with pytest.raises(ConfigError, match="embeddings need objective itc"):
        vision.encode_images([image])


def test_folder_without_weights_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished stage"):
        load_model(tmp_path)
