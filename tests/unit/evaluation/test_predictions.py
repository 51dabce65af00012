"""The Python API and explanations on tiny models: each result equals the model's own outputs."""

import json
import re
import shutil
from pathlib import Path

import mome
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config.errors import CheckpointError, ConfigError, DataError
from pipeline.data.contents.choices import ANSWERS, Choices
from pipeline.data.contents.images import resize_for
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.explain import draw_explanation, draw_heat_map, explain, render_explanation, untrained_notes
from pipeline.evaluation.retrieval import Predictor
from pipeline.inference import TrainedModel, load
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.objectives import head_config
from pipeline.objectives.wpa import wpa_cost, wpa_plan
from pipeline.training.checkpoint.weights import save_weights, stage_url
from tests.support.trial import Cell, trial_config


@pytest.fixture
def trained(model, tokenizer, config):
    return TrainedModel(model, tokenizer, config, config.stages[2], {})


@pytest.fixture
def image(held_out):
    return held_out.image(0).numpy()


def test_loaded_run_encodes_images_and_texts_as_evaluation_does(model, config, held_out, tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="no finished stage"):
        load(tmp_path)
    config, url = config.model_copy(update={"output": str(tmp_path)}), f"{tmp_path}/tiny/stages/2-vision_language"
    metadata = {"config": config.model_dump(mode="json"), "stage": "vision_language", "step": 4, "absent": []}
    save_weights(Storage(), url, dict(model.state_dict()), list(tokenizer.tokens), metadata)
    loaded = load(tmp_path / "tiny")
    assert loaded.url == url
    images, captions = [held_out.image(n).numpy() for n in range(5)], [held_out.captions[n][0] for n in range(5)]
    for number in (0, 2):
        Image.fromarray(images[number]).save(file := tmp_path / f"{number}.png")
    inputs = [(tmp_path / "0.png").read_bytes(), images[1], str(file), file, Image.fromarray(images[4])]
    predictor, rows = Predictor(model, tokenizer), [tokens.ids for tokens in tokenizer.encode_batch(captions, 40)]
    expected = predictor.embed_images(torch.from_numpy(np.stack([images[n] for n in (0, 1, 2, 2, 4)])))
    torch.testing.assert_close(loaded.encode_image(inputs, batch_size=2), expected)
    torch.testing.assert_close(loaded.encode_image(np.stack(images[:2])), expected[:2])  # an array is a sequence
    texts = predictor.embed_texts(rows)
    torch.testing.assert_close(loaded.encode_text(captions), texts)
    pixels = torch.from_numpy(np.stack(images[:2]))  # one item drops its dimension, and tensors are read like arrays
    torch.testing.assert_close(loaded.encode_image(pixels), expected[:2])
    torch.testing.assert_close(loaded.encode_image(pixels[1]), expected[1])
    torch.testing.assert_close(loaded.encode_text(captions[0]), texts[0])
    torch.testing.assert_close(loaded.similarity(inputs, captions), expected @ texts.T)
    torch.testing.assert_close(loaded.similarity(file, captions), texts @ expected[2])
    torch.testing.assert_close(loaded.similarity(inputs, captions[1]), expected @ texts[1])
    assert loaded.similarity(file, captions[1]).shape == loaded.match(file, captions[1]).shape == ()
    pairs = loaded.match(inputs[:2] * 2, [captions[0], captions[1], captions[2], captions[0]])
    torch.testing.assert_close(loaded.match(inputs[0], [captions[0], captions[2]]), pairs[[0, 2]])
    torch.testing.assert_close(loaded.match(inputs[:2], captions[0]), pairs[[0, 3]])


def test_the_guides_example_runs_as_written(model, config, held_out, tokenizer, tmp_path, monkeypatch, capsys):
    config = config.model_copy(update={"output": f"{tmp_path}/runs", "name": "demo"})
    metadata = {"config": config.model_dump(mode="json"), "stage": "vision_language", "step": 4, "absent": []}
    save_weights(Storage(), stage_url(config, 2), dict(model.state_dict()), list(tokenizer.tokens), metadata)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("circle", "square")):
        Image.fromarray(held_out.image(number).numpy()).save(f"{name}.png")
    guide = (Path(__file__).parents[3] / "pipeline" / "README.md").read_text(encoding="utf-8")
    example, training = re.findall(r"```python\n(import mome\n.*?|from PIL.*?)```", guide, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "pipeline/README.md", "exec"), names)
    assert "{" in capsys.readouterr().out
    assert isinstance(names["model"], mome.TrainedModel)

    def finish(settings, display):  # the training itself: test_wheel_trains_and_serves_in_a_fresh_environment
        assert (settings.folder, settings.stages[0].steps) == ("runs/small", 20)
        shutil.copytree("runs/demo", settings.folder)
        return {"retrieval": {}}

    monkeypatch.setattr("jobs.train.run_and_evaluate", finish)
    exec(compile(training, "pipeline/README.md", "exec"), names := {})
    assert names["model"].step == 4


def test_pair_predictions_are_the_heads_outputs(trained, model, image, held_out, tokenizer):
    text, pixels = held_out.captions[0][0], held_out.images[:1]
    prediction = trained.predict([image], text)
    assert prediction.keys() == {"similarity", "matched"}
    assert trained.predict(image, text) == trained.predict(Image.fromarray(image), text) == prediction
    ids = torch.tensor([tokenizer.encode(text, 40).ids])
    inputs = [ForwardInput(("itc",), image=pixels), ForwardInput(("itc",), text=ids)]
    inputs.append(ForwardInput(heads=("itm",), image=pixels, text=ids))
    with torch.no_grad():
        vision, language, fused = (model.eval()({"x": value})["x"] for value in inputs)
    cosines = [(vision[name] @ language[name].T).item() for name in ("itc", "itc_vl")]
    assert prediction["similarity"] == pytest.approx(sum(cosines) / 2, abs=1e-5)
    assert prediction["matched"] == pytest.approx(fused["itm"].softmax(dim=1)[0, 1].item(), abs=1e-6)
    scores = trained.match([image] * 3, [text, "a circle", text], batch_size=2)
    assert scores[[0, 2]].tolist() == pytest.approx([prediction["matched"]] * 2, abs=1e-6)
    cosine = trained.encode_image([image]) @ trained.encode_text([text]).T
    assert cosine.item() == pytest.approx(prediction["similarity"], abs=1e-6)


def test_masks_are_filled_and_questions_answered(trained, config, tokenizer, image, tmp_path):
    text = "a large [MASK] circle above a [MASK] square"
    ids, positions = trained.tokenize_masked(text)
    assert [ids[p] for p in positions] == [tokenizer.mask_id] * 2
    unmasked = tokenizer.encode("a large circle above a square", 40).ids
    assert [token for token in ids if token != tokenizer.mask_id] == unmasked
    alone, with_image = trained.fill_mask(text, top_k=3), trained.fill_mask(text, image, top_k=3)
    assert [len(words) for words in alone] == [len(words) for words in with_image] == [3, 3]
    assert alone != with_image
    assert trained.predict([image], text, top_k=3) == {"words": with_image}
    other = "a [MASK] square"
    expected = [alone, trained.fill_mask(other, top_k=3)]
    assert trained.fill_mask([text, other], top_k=3) == expected
    expected = [with_image, trained.fill_mask(other, image, top_k=3)]
    assert trained.fill_mask([text, other], image, top_k=3) == expected
    assert trained.fill_mask((text, other), [image, image], top_k=3) == expected
    assert trained.fill_mask(text, [image], top_k=3) == [with_image]
    stage = config.stages[2].model_copy(update={"objectives": {"vqa": None}, "num_answers": 3})
    model = build_model(config.model, tokenizer.size, HeadConfig(answers=3), seed=1)
    trained = TrainedModel(model, tokenizer, config, stage, {ANSWERS: Choices(("yes", "no", "red"))})
    answers = trained.answer(image, "is it red?", top_k=2)
    assert set(answers) < {"yes", "no", "red"}
    assert list(answers.values()) == sorted(answers.values(), reverse=True)
    assert trained.predict([image], "is it red?", top_k=2) == {"answers": answers}
    Image.fromarray(image).save(file := tmp_path / "image.png")
    other = trained.answer(image, "is it a circle?", top_k=2)
    for single in (image, torch.from_numpy(image), Image.fromarray(image), file, str(file), file.read_bytes()):
        assert trained.answer(single, ["is it red?", "is it a circle?"], top_k=2) == [answers, other]
        assert trained.answer(single, "is it red?", top_k=2) == answers
    assert trained.answer([image, file], ["is it red?", "is it a circle?"], top_k=2) == [answers, other]
    assert trained.answer([image, file], "is it red?", top_k=2) == [answers, answers]


NEEDS = r"itc needs an image and a text; itm needs .*mlm needs"


def test_unusable_inputs_are_rejected_with_the_remedy(trained, config, image):
    vision = TrainedModel(trained.model, trained.tokenizer, config, config.stages[0], {})
    for call, error, message in (
        (lambda: trained.predict([], "a circle"), ConfigError, NEEDS),
        (lambda: trained.predict([image] * 2, "a circle"), ConfigError, f"from two images and .*{NEEDS}"),
        (lambda: trained.predict([image] * 3, "a circle"), ConfigError, f"from 3 images and .*{NEEDS}"),
        (lambda: trained.predict([image], "  "), ConfigError, "no token is left"),
        (lambda: trained.fill_mask("[MASK] " * 50), ConfigError, "at most 40"),
        (lambda: trained.fill_mask("a circle"), ConfigError, r"no \[MASK\]"),
        (lambda: trained.answer(image, "what?"), ConfigError, "answers need objective vqa"),
        (lambda: trained.match([image], []), ConfigError, "no texts are given"),
        (lambda: trained.match([image], ["a", "b"]), ConfigError, "1 images and 2 texts"),
        (lambda: trained.match([], "a circle"), ConfigError, "no images are given"),
        (lambda: trained.fill_mask(["a [MASK]"] * 3, [image] * 2), ConfigError, "2 images and 3 texts"),
        (lambda: trained.similarity([], "a circle"), ConfigError, "no images are given"),
        (lambda: trained.encode_image(np.zeros((0, 32, 32, 3), np.uint8)), ConfigError, "no images are given"),
        (lambda: trained.encode_text([]), ConfigError, "no texts are given"),
        (lambda: trained.fill_mask([]), ConfigError, "no texts are given"),
        (lambda: trained.fill_mask("a [MASK]", []), ConfigError, "no images are given"),
        (lambda: trained.encode_image(["no.jpg"]), ConfigError, "no such file; give the path or URL"),
        (lambda: trained.encode_image([b"no image"]), DataError, "give a JPEG"),
        (lambda: trained.encode_image([image[..., 0]]), ConfigError, "expected .height, width, 3. uint8"),
        (lambda: vision.predict([image]), ConfigError, "objectives without predictions: mim"),
        (lambda: vision.encode_image([image]), ConfigError, "embeddings need objective itc"),
    ):
        with pytest.raises(error, match=message):
            call()


TEXT = "a red circle above blsquare"  # the last word has two tokens
TOKENIZER = Tokenizer.train(["a red circle above a square", "a blue square", "a bl square"], 60)
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["vlmo", "vilt"])
def aligner(request):
    return build_model(trial_config(Cell("mlm", request.param, "pairs")).model, TOKENIZER.size, seed=4)


@pytest.fixture(scope="module")
def explanation(aligner):
    return explain(aligner, TOKENIZER, torch.from_numpy(resize_for(IMAGE, aligner.config)), TEXT, 12)


def test_heat_is_the_transport_plan_and_guesses_are_those_of_the_model_with_the_word_masked(aligner, explanation):
    rows, columns = (side // aligner.config.patch_size for side in explanation.image.shape[:2])
    assert columns == (3 if aligner.config.kind == "vilt" else 2), "ViLT keeps the aspect ratio"
    tokens = TOKENIZER.encode(TEXT, 12)
    pair = ForwardInput(heads=("alignment",), image=explanation.image[None], text=torch.tensor([tokens.ids]))
    with torch.no_grad():
        out = aligner({"x": pair})["x"]
        cost = wpa_cost(out["words"], out["patches"])
        plan = wpa_plan(cost, out["words_keep"], out["patches_keep"])[0]
    assert explanation.distance == pytest.approx((plan * cost[0]).sum().item())
    assert [word.word for word in explanation.words] == TEXT.split()
    for number, word in enumerate(explanation.words):
        places = [place for place, of in enumerate(tokens.word_of) if of == number]
        assert len(places) == (1 if number < 4 else len(tokens.ids) - 6)
        moved = plan[places].sum(dim=0)
        assert word.heat.shape == (rows, columns)
        torch.testing.assert_close(word.heat.flatten(), moved / moved.sum(), rtol=1e-4, atol=1e-6)
        text = torch.tensor([[TOKENIZER.mask_id if place in places else t for place, t in enumerate(tokens.ids)]])
        truth = [tokens.ids[place] for place in places]
        for image, condition in ((explanation.image[None], word.with_image), (None, word.without_image)):
            one = ForwardInput(heads=("mlm",), image=image, text=text, mask_positions=torch.tensor([places]))
            with torch.no_grad():
                odds = aligner({"x": one})["x"]["mlm"][0].softmax(-1)
            expected = odds[torch.arange(len(truth)), truth].prod().item()
            assert condition.truth_probability == pytest.approx(expected, rel=1e-4)
            assert condition.guesses[0].word == TOKENIZER.decode(odds.argmax(dim=1).tolist())
            assert condition.guesses[0].probability == pytest.approx(odds.amax(dim=1).prod().item(), rel=1e-4)
            assert len(condition.guesses) == (3 if number < 4 else 1)
            assert all(guess.is_right == (guess.word == word.word) for guess in condition.guesses)


def test_drawings_are_complete_and_escape_the_text(explanation):
    heat = explanation.words[0].heat
    drawn = torch.from_numpy(np.asarray(draw_heat_map(explanation, explanation.words[0])).astype(np.float32))
    of_patch = torch.nn.functional.adaptive_avg_pool2d((drawn[:, :, 0] - drawn[:, :, 1])[None], heat.shape)
    assert int(of_patch.argmax()) == int(heat.argmax()), "the hottest patch is the reddest"
    page = render_explanation(explanation, "<b>words</b>", "checkpoint", ["a note"], ".html").decode()
    assert page.count("data:image/png;base64,") == 1 + len(explanation.words)
    assert not any(part in page for part in ("<b>words</b>", "http:", "https:"))
    guesses = [guess.word for word in explanation.words for guess in word.with_image.guesses]
    assert all(guess in page or not guess.isalnum() for guess in guesses)
    pixels = np.asarray(draw_explanation(explanation, TEXT, "checkpoint", []))
    assert pixels.shape[1] >= 16 + 4 * (224 + 16)
    assert (pixels == 255).all(axis=2).mean() < 0.9


def explain_trial(folder, cell, out, text="a red circle", image=None):
    config, photo, run = trial_config(cell), folder / "photo.png", folder / str(cell)
    Image.fromarray(IMAGE).save(photo)
    model = build_model(config.model, TOKENIZER.size, head_config(config, 0), seed=1)
    metadata = {"config": config.model_dump(mode="json"), "stage": "trial", "step": 30}
    save_weights(Storage(), f"{run}/stages/0-trial", dict(model.state_dict()), list(TOKENIZER.tokens), metadata)
    arguments = ["--image", str(image or photo), "--text", text, "--out", str(folder / out), "--json"]
    done = CliRunner().invoke(app, ["explain", str(run), *arguments])
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout.splitlines()[-1])


def test_command_renders_alignments_notes_untrained_objectives_and_rejects_unusable_inputs(tmp_path):
    for kind, out, start in (("vlmo", "drawn.html", b"<!doctype html>"), ("vilt", "drawn.png", b"\x89PNG")):
        result = explain_trial(tmp_path, Cell("wpa", kind, "pairs"), out)
        assert [word["word"] for word in result["words"]] == ["a", "red", "circle"]
        for word in result["words"]:
            assert len(word["with_image"]["guesses"]) == len(word["without_image"]["guesses"]) == 3
            assert 0 < word["hottest_patch"]["share"] <= 1
        assert (tmp_path / out).read_bytes().startswith(start)
    untrained = {("wpa", "pairs"): ["mlm"], ("mlm", "pairs"): ["wpa"], ("mlm", "text"): ["wpa", "with images"]}
    for (objective, source_type), parts in untrained.items():
        notes = untrained_notes(trial_config(Cell(objective, "vlmo", source_type)), "trial")
        assert [part in note for part, note in zip(parts, notes, strict=True)] == [True] * len(parts)
    wpa, damaged = Cell("wpa", "vlmo", "pairs"), tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8 no image")
    for arguments, error, message in (
        ((Cell("itc", "dual_encoder", "pairs"), "drawn.html"), ConfigError, r"dual_encoder.*vlmo, vilt"),
        ((wpa, "drawn.pdf"), ConfigError, r"drawn\.pdf.*\.html or \.png"),
        ((wpa, "drawn.png", "a", damaged), DataError, r"damaged\.jpg.*JPEG, PNG or WebP"),
        ((wpa, "drawn.png", " "), DataError, "at least one word"),
    ):
        with pytest.raises(error, match=message):
            explain_trial(tmp_path, *arguments)
