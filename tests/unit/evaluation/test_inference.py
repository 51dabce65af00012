"""The Python API on a tiny model with random weights: each result equals the model's own outputs."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.errors import CheckpointError, ConfigError, DataError
from pipeline.data.contents.choices import ANSWERS, Choices
from pipeline.data.storage import Storage
from pipeline.evaluation.retrieval import Predictor
from pipeline.inference import TrainedModel, load_model
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.training.checkpoint.weights import save_weights


@pytest.fixture
def trained(model, tokenizer, config):
    return TrainedModel(model, tokenizer, config, config.stages[2], {})


@pytest.fixture
def image(held_out):
    return held_out.image(0).numpy()


def encoded(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_loaded_run_encodes_images_and_texts_as_evaluation_does(model, config, held_out, tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="no finished stage"):
        load_model(tmp_path)
    config = config.model_copy(update={"output": str(tmp_path)})
    metadata = {"config": config.model_dump(mode="json"), "stage": "vision_language", "step": 4, "absent": []}
    url = f"{tmp_path}/tiny/stages/2-vision_language"
    save_weights(Storage(), url, dict(model.state_dict()), list(tokenizer.tokens), metadata)
    loaded = load_model(tmp_path / "tiny")
    assert loaded.url == url
    images, captions = [held_out.image(n).numpy() for n in range(5)], [held_out.captions[n][0] for n in range(5)]
    file = tmp_path / "2.png"
    file.write_bytes(encoded(images[2]))
    inputs = [encoded(images[0]), images[1], str(file), file, Image.fromarray(images[4])]
    predictor, rows = Predictor(model, tokenizer), [tokens.ids for tokens in tokenizer.encode_batch(captions, 40)]
    expected = predictor.embed_images(torch.from_numpy(np.stack([images[n] for n in (0, 1, 2, 2, 4)])))
    torch.testing.assert_close(loaded.encode_images(inputs, batch_size=2), expected)
    torch.testing.assert_close(loaded.encode_images(np.stack(images[:2])), expected[:2])  # an array is a sequence
    torch.testing.assert_close(loaded.encode_texts(captions), predictor.embed_texts(rows))


def test_pair_predictions_are_the_heads_outputs(trained, model, image, held_out, tokenizer):
    text, pixels = held_out.captions[0][0], held_out.images[:1]
    prediction = trained.predict([image], text)
    assert prediction.keys() == {"similarity", "matched"}
    ids = torch.tensor([tokenizer.encode(text, 40).ids])
    inputs = {
        "vision": ForwardInput(heads=("itc",), image=pixels),
        "language": ForwardInput(heads=("itc",), text=ids),
        "fused": ForwardInput(heads=("itm",), image=pixels, text=ids),
    }
    with torch.no_grad():
        outputs = {name: model.eval()({"x": value})["x"] for name, value in inputs.items()}
    cosines = [(outputs["vision"][name] @ outputs["language"][name].T).item() for name in ("itc", "itc_vl")]
    assert prediction["similarity"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert prediction["matched"] == pytest.approx(outputs["fused"]["itm"].softmax(dim=1)[0, 1].item(), abs=1e-6)
    scores = trained.score_pairs([image] * 3, [text, "a circle", text], batch_size=2)
    assert scores[[0, 2]].tolist() == pytest.approx([prediction["matched"]] * 2, abs=1e-6)
    cosine = trained.encode_images([image]) @ trained.encode_texts([text]).T
    assert cosine.item() == pytest.approx(prediction["similarity"], abs=1e-6)


def test_masks_are_filled_and_questions_answered(trained, config, tokenizer, image):
    text = "a large [MASK] circle above a [MASK] square"
    ids, positions = trained.tokenize_masked(text)
    assert [ids[p] for p in positions] == [tokenizer.mask_id] * 2
    unmasked = tokenizer.encode("a large circle above a square", 40).ids
    assert [token for token in ids if token != tokenizer.mask_id] == unmasked
    alone, with_image = trained.fill_masks(text, top_k=3), trained.fill_masks(text, image, top_k=3)
    assert [len(words) for words in alone] == [len(words) for words in with_image] == [3, 3]
    assert alone != with_image
    assert trained.predict([image], text, top_k=3) == {"words": with_image}
    stage = config.stages[2].model_copy(update={"objectives": {"vqa": None}, "num_answers": 3})
    model = build_model(config.model, tokenizer.size, HeadConfig(answers=3), seed=1)
    trained = TrainedModel(model, tokenizer, config, stage, {ANSWERS: Choices(("yes", "no", "red"))})
    answers = trained.answer(image, "is it red?", top_k=2)
    assert set(answers) < {"yes", "no", "red"}
    assert list(answers.values()) == sorted(answers.values(), reverse=True)
    assert trained.predict([image], "is it red?", top_k=2) == {"answers": answers}


NEEDS = r"itc needs an image and a text; itm needs .*mlm needs"


def test_unusable_inputs_are_rejected_with_the_remedy(trained, config, image):
    vision = TrainedModel(trained.model, trained.tokenizer, config, config.stages[0], {})
    for call, error, message in (
        (lambda: trained.predict([], "a circle"), ConfigError, NEEDS),
        (lambda: trained.predict([image] * 2, "a circle"), ConfigError, f"from two images and .*{NEEDS}"),
        (lambda: trained.predict([image] * 3, "a circle"), ConfigError, f"from 3 images and .*{NEEDS}"),
        (lambda: trained.predict([image], "  "), ConfigError, "no token is left"),
        (lambda: trained.fill_masks("[MASK] " * 50), ConfigError, "at most 40"),
        (lambda: trained.fill_masks("a circle"), ConfigError, r"no \[MASK\]"),
        (lambda: trained.answer(image, "what?"), ConfigError, "answers need objective vqa"),
        (lambda: trained.score_pairs([image], []), ValueError, "1 images and 0 texts"),
        (lambda: trained.encode_images([]), ValueError, "at least one"),
        (lambda: trained.encode_images(["no.jpg"]), ConfigError, "no such file"),
        (lambda: trained.encode_images([b"no image"]), DataError, "give a JPEG"),
        (lambda: trained.encode_images([image[..., 0]]), ConfigError, "expected .height, width, 3. uint8"),
        (lambda: vision.predict([image]), ConfigError, "objectives without predictions: mim"),
        (lambda: vision.encode_images([image]), ConfigError, "embeddings need objective itc"),
    ):
        with pytest.raises(error, match=message):
            call()
