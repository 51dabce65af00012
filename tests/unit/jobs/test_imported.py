"""Published task checkpoints, imported from a file or a folder, give the predictions of their original code.

The checkpoints are tiny models with random weights: of Hugging Face's own classes (contract C8), and for releases
whose code is not packaged, of our models, which tests/golden compares with the released code.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from torch import Tensor

from jobs.convert import export_weights, import_weights
from jobs.predict import predict
from pipeline.config.errors import CheckpointError, ConfigError, MomeError
from pipeline.config.schema import TransformerConfig, ViLTConfig, VLMoConfig
from pipeline.data.contents.images import decode, resize_for
from pipeline.data.storage import Storage
from pipeline.inference import build_trained_model, load_usable_weights
from pipeline.models import build_model, skeleton
from pipeline.models.checkpoints import FORMATS
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.objectives import modules_for
from pipeline.training.checkpoint import Weights, load_weights, save_weights
from pipeline.training.stages import load_matching
from tests.support.fuzz import fuzz_rounds, mutate

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
TEXT, MASKED = "a b c d", "a [MASK] c"
ANSWERS = ["yes", "no", "2", "a cat", "blue"]
LABELS = ["crane", "dog", "crane", "cat", "bird", "tree"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EPSILON = 1e-3  # large enough that a missing parameter changes the result
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
PICTURES = {**SIZES, "image_size": 24, "patch_size": 8, "layer_norm_eps": EPSILON}
VILT = {**PICTURES, "vocab_size": len(TOKENS), "max_position_embeddings": 10}


def numbered(names: list[str]) -> dict[str, Any]:
    return {"num_labels": len(names), "id2label": dict(enumerate(names))}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """Published checkpoint: its format, its construction, and the prediction of its original code."""

    format: str
    make: Callable[[], Any]  # a Hugging Face model, or our config section and heads
    expected: Callable[[Any, Inputs], Any]
    given: tuple[int, str | None] = (1, TEXT)  # number of images, and the text
    overrides: tuple[str, ...] = ()
    answers: bool = False  # whether --answers is needed


@dataclass(frozen=True)
class Inputs:
    """Inputs of a prediction, as tensors for the original code."""

    pixels: tuple[Tensor, ...]  # (1, 3, H, W) in [-1, 1]
    ids: Tensor  # (1, L)
    weights: Weights

    @property
    def words(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}

    @property
    def both(self) -> dict[str, Tensor]:
        return {**self.words, "pixel_values": self.pixels[0]}


def hugging_face(kind: str, config: str, **sizes: Any) -> Callable[[], Any]:
    return lambda: randomised(getattr(transformers, kind)(getattr(transformers, config)(**sizes)))


def ranked(logits: Tensor, names: list[str]) -> dict[str, float]:
    return {names[n]: pytest.approx(p, abs=2e-5) for n, p in enumerate(logits.tolist())}  # type: ignore[misc]


def masked(logits: Tensor, inputs: Inputs) -> dict[str, Any]:
    (place,) = (inputs.ids[0] == TOKENS.index("[MASK]")).nonzero().flatten()
    return {"words": [ranked(logits[0, place].softmax(0), TOKENS)]}


def outputs(inputs: Inputs, head: str, **given: Any) -> Tensor:
    """Return what the imported model computes."""
    return build_trained_model(inputs.weights).eval()({"x": ForwardInput(heads=(head,), **given)})["x"][head]


def same_tokens(model: Any, inputs: Inputs, heads: str) -> None:
    """Compare encoder outputs, for checkpoints without a head that predicts."""
    image = inputs.pixels[0]
    hidden = model(image).last_hidden_state if heads == "bare" else model.beit(image).last_hidden_state
    if heads == "pooler":
        hidden = model.beit.pooler.layernorm(hidden)
    torch.testing.assert_close(outputs(inputs, "tokens", image=image.permute(0, 2, 3, 1)), hidden, **CLOSE)


def same_visual_tokens(model: Any, inputs: Inputs) -> None:
    image, places = inputs.pixels[0], torch.tensor([[0, 3, 5]])
    covered = torch.zeros(1, 9, dtype=torch.bool).scatter(1, places, True)
    logits = outputs(inputs, "mim", image=image.permute(0, 2, 3, 1), patch_positions=places)
    torch.testing.assert_close(logits, model(image, bool_masked_pos=covered).logits[:, places[0]], **CLOSE)
    stage = inputs.weights.config.stage_named(inputs.weights.stage)
    assert (stage.image_target, stage.image_tokenizer.tokens) == ("visual_tokens", 192)  # type: ignore[union-attr]


def same_words(model: Any, inputs: Inputs) -> None:
    hidden = outputs(inputs, "tokens", text=inputs.ids)
    torch.testing.assert_close(hidden, model(**inputs.words).last_hidden_state, **CLOSE)


def released(
    section: TransformerConfig, *heads: str, has: HeadConfig = HeadConfig(), drop: tuple[str, ...] = (), images: int = 1
) -> Case:
    """Return a release of `section` without the tensors that begin with `drop`, and the heads that predict."""

    def make() -> Any:
        model = randomised(build_model(section, len(TOKENS), has))
        model.dropped = drop  # type: ignore[assignment]
        return model

    is_relative = getattr(section, "positions", None) == "relative"
    return Case(
        section.kind,
        make,
        lambda model, inputs: our_own(model, inputs, *heads),
        given=(images, TEXT),
        overrides=("max_text_length=10",) if is_relative else ("heads=3",),
        answers="answers" in heads,
    )


def our_own(model: Any, inputs: Inputs, *heads: str) -> dict[str, Any]:
    """Return the predictions of our model, before its conversion to a release's format, for the same input."""
    images = [pixels.permute(0, 2, 3, 1) for pixels in inputs.pixels]
    second = {"second_image": images[1]} if len(images) > 1 else {}
    text: dict[str, Any] = {} if not inputs.ids.numel() else {"text": inputs.ids}
    fused = {**second, **text, "image": images[0]}
    predictions: dict[str, Any] = {}
    for head in heads:
        if head == "itc":
            image, said = (
                model({"x": ForwardInput(heads=("itc",), **given)})["x"] for given in ({"image": images[0]}, text)
            )
            names = [name for name in ("itc", "itc_vl") if name in image]
            cosines = [(image[name] @ said[name].T).item() for name in names]
            predictions["similarity"] = pytest.approx(sum(cosines) / len(names), abs=2e-5)
            continue
        out = model({"x": ForwardInput(heads=(head,), **fused)})["x"][head][0]  # type: ignore[arg-type]
        if head == "answers":
            predictions["answers"] = ranked(out.sigmoid(), ANSWERS)
        elif head == "ranking":
            predictions["ranking"] = pytest.approx(out.item(), abs=2e-4)
        else:
            name = {"itm": "matched", "nlvr2": "true"}[head]
            predictions[name] = pytest.approx(out.softmax(0)[1].item(), abs=2e-5)
    return predictions


OURS = {"width": 24, "layers": 3, "heads": 3, "image_size": 24, "patch_size": 8}
RELATIVE = VLMoConfig(**OURS, vision_language_layers=1, max_text_length=10)
ABSOLUTE = VLMoConfig(**OURS, vision_language_layers=1, max_text_length=10, positions="absolute", layer_scale=None)
RETRIEVAL = RELATIVE.model_copy(update={"contrasts": 1})
RELEASED_VILT = ViLTConfig(**OURS, longest_side=39, max_text_length=10)
SHORT = ("max_text_length=10",)

CASES = {
    "BERT, pretrained": Case(
        "bert",
        hugging_face("BertForPreTraining", "BertConfig", **SIZES, vocab_size=len(TOKENS), layer_norm_eps=EPSILON,
                     max_position_embeddings=20),
        lambda model, inputs: masked(model(**inputs.words).prediction_logits, inputs),
        given=(0, MASKED),
    ),
    "BERT, masked words": Case(
        "bert",
        hugging_face("BertForMaskedLM", "BertConfig", **SIZES, vocab_size=len(TOKENS)),
        lambda model, inputs: masked(model(**inputs.words).logits, inputs),
        given=(0, MASKED),
    ),
    "BERT, bare": Case(
        "bert", hugging_face("BertModel", "BertConfig", **SIZES, vocab_size=len(TOKENS), layer_norm_eps=EPSILON),
        same_words, given=(0, TEXT),
    ),
    "ViT, bare": Case(
        "vit", hugging_face("ViTModel", "ViTConfig", **PICTURES, qkv_bias=False),
        lambda model, inputs: same_tokens(model, inputs, "bare"), given=(1, None),
    ),
    "ViT, classes": Case(
        "vit",
        hugging_face("ViTForImageClassification", "ViTConfig", **PICTURES, **numbered(LABELS)),
        lambda model, inputs: {
            "classes": ranked(model(inputs.pixels[0]).logits[0].softmax(0), [*LABELS[:2], "crane (2)", *LABELS[3:]])
        },
        given=(1, None),
    ),
    "BEiT, pretrained": Case(
        "beit",
        hugging_face("BeitForMaskedImageModeling", "BeitConfig", **PICTURES, vocab_size=192, use_mask_token=True,
                     use_shared_relative_position_bias=True),
        same_visual_tokens, given=(1, None),
    ),
    "BEiT, classes": Case(
        "beit",
        hugging_face("BeitForImageClassification", "BeitConfig", **PICTURES, use_relative_position_bias=True,
                     **numbered(LABELS)),
        lambda model, inputs: same_tokens(model, inputs, "pooler"), given=(1, None),
    ),
    "BEiT, bare": Case(
        "beit",
        hugging_face("BeitModel", "BeitConfig", **PICTURES, use_relative_position_bias=True, use_mean_pooling=False),
        lambda model, inputs: same_tokens(model, inputs, "bare"), given=(1, None),
    ),
    "BEiT, absolute positions": Case(
        "beit",
        hugging_face("BeitModel", "BeitConfig", **PICTURES, use_absolute_position_embeddings=True,
                     use_mean_pooling=False),
        lambda model, inputs: same_tokens(model, inputs, "bare"), given=(1, None),
    ),
    "ViLT of Hugging Face, masked words": Case(
        "vilt-hf", hugging_face("ViltForMaskedLM", "ViltConfig", **VILT),
        lambda model, inputs: masked(model(**inputs.both).logits, inputs), given=(1, MASKED),
    ),
    "ViLT of Hugging Face, VQA": Case(
        "vilt-hf", hugging_face("ViltForQuestionAnswering", "ViltConfig", **VILT, **numbered(ANSWERS)),
        lambda model, inputs: {"answers": ranked(model(**inputs.both).logits[0].sigmoid(), ANSWERS)},
    ),
    "ViLT of Hugging Face, NLVR2": Case(
        "vilt-hf",
        hugging_face("ViltForImagesAndTextClassification", "ViltConfig", **VILT, num_images=2,
                     modality_type_vocab_size=3, id2label={0: "False", 1: "True"}),
        lambda model, inputs: {
            "true": pytest.approx(
                model(**inputs.words, pixel_values=torch.stack(inputs.pixels, 1)).logits[0].softmax(0)[1].item(),
                abs=2e-5,
            )
        },
        given=(2, TEXT),
    ),
    "ViLT of Hugging Face, retrieval": Case(
        "vilt-hf", hugging_face("ViltForImageAndTextRetrieval", "ViltConfig", **VILT, qkv_bias=False),
        lambda model, inputs: {"ranking": pytest.approx(model(**inputs.both).logits.item(), abs=2e-4)},
    ),
    "ViLT, pretrained": released(RELEASED_VILT, "itm"),
    "ViLT, VQA": released(RELEASED_VILT, "answers", has=HeadConfig(answers=5), drop=("itm", "mlm")),
    "ViLT, NLVR2": released(RELEASED_VILT, "nlvr2", has=HeadConfig(nlvr2=True), drop=("itm", "mlm"), images=2),
    "ViLT, retrieval": released(RELEASED_VILT, "itm", "ranking", has=HeadConfig(ranking=True), drop=("mlm",)),
    "VLMo, pretrained": released(RELATIVE, "itc", "itm"),
    "VLMo of absolute positions, pretrained": released(ABSOLUTE, "itc", "itm"),
    "VLMo, retrieval": released(RETRIEVAL, "itc", drop=("itm", "mlm", "pooler")),
    "VLMo, VQA": released(RELATIVE, "answers", has=HeadConfig(answers=5), drop=("itm", "mlm", "itc", "logit")),
    "VLMo, NLVR2": released(
        RELATIVE, "nlvr2", has=HeadConfig(nlvr2=True), drop=("itm", "mlm", "itc", "logit"), images=2
    ),
}  # fmt: skip


def publish(model: Any, case: Case, folder: Path, layout: str) -> str:
    """Write a checkpoint in its published layout and return the path to give to `mome import`."""
    folder.mkdir()
    if isinstance(model, transformers.PreTrainedModel):
        model.save_pretrained(folder, max_shard_size="30KB" if layout == "shards" else "1GB")
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
        assert (folder / "model.safetensors.index.json").exists() == (layout == "shards")
        if layout == "bin":
            state = safetensors.torch.load_file(folder / "model.safetensors")
            (folder / "model.safetensors").unlink()
            torch.save(state, folder / "pytorch_model.bin")
        return str(folder / "model.safetensors") if layout == "file" else str(folder)
    state = FORMATS[case.format].write(model.state_dict(), model.config)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(model.dropped or ("-",))}
    if layout == "file":
        torch.save({"state_dict": state}, folder / "model.ckpt")
        return str(folder / "model.ckpt")
    if layout == "bin":
        torch.save({"module": {f"module.{name}": t for name, t in state.items()}}, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(state, folder / "model.safetensors")
    return str(folder)


def photos(folder: Path) -> list[str]:
    noise = np.random.default_rng(3)
    for name, size in (("one.png", (40, 31, 3)), ("two.png", (24, 47, 3))):
        Image.fromarray(noise.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    return [str(folder / "one.png"), str(folder / "two.png")]


def inputs_of(weights: Weights, images: list[str], text: str | None) -> Inputs:
    pixels = []
    for path in images:
        image = resize_for(decode(Path(path).read_bytes(), 10**6), weights.config.model)
        pixels.append(torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1)
    tokens = [] if text is None else [4 if word == "[MASK]" else TOKENS.index(word) for word in text.split()]
    ids = torch.tensor([[2, *tokens, 3]]) if tokens else torch.zeros(1, 0, dtype=torch.int64)
    return Inputs(tuple(pixels), ids, weights)


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    return str(tmp_path / "vocab.txt")


FIRST = {
    case.format: name for name, case in reversed(CASES.items())
}  # one case per format is also tested in the rarer layouts
LAYOUTS = [
    (name, layout)
    for name, case in CASES.items()
    for layout in ("file", "folder", "bin", "shards")
    if layout in ("file", "folder") or (name == FIRST[case.format] and FORMATS[case.format].config is not None)
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@torch.no_grad()
def test_imported_checkpoint_predicts_like_the_original(
    name: str, layout: str, tmp_path: Path, vocabulary: str
) -> None:
    case, model = CASES[name], CASES[name].make()
    path, out = publish(model, case, tmp_path / "published", layout), f"{tmp_path}/imported"
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    import_weights(
        path,
        case.format,
        out,
        case.overrides,
        vocabulary=None if FORMATS[case.format].config else vocabulary,
        answers=f"{tmp_path}/answers.json" if case.answers else None,
    )
    weights = load_weights(Storage(), out)
    count, text = case.given
    images = photos(tmp_path)[:1] * count  # of equal shape, because the original code stacks them
    expected = case.expected(model, inputs_of(weights, images, text))
    one, two = (*images, None, None)[:2]
    if expected is None:
        with pytest.raises(ConfigError, match="nothing can be predicted"):
            predict(out, one, two, text)
    else:
        first = predict(out, one, two, text, top=100)
        assert {key: first[key] for key in expected} == expected
        # Export and re-import give the same predictions (B6), in both file formats.
        for ending in ("pt", "safetensors") if layout == "file" else ():
            export_weights(out, case.format, f"{tmp_path}/again.{ending}")
            import_weights(f"{tmp_path}/again.{ending}", case.format, f"{out}-{ending}", vocabulary=vocabulary)
            again = predict(f"{out}-{ending}", one, two, text, top=100)
            assert {key: again[key] for key in expected} == {key: first[key] for key in expected}


def imported(state: dict[str, Tensor], format_name: str, folder: Path, *overrides: str, **more: Any) -> str:
    """Import a file of these tensors and return the folder of weights."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "weights.pt")
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("".join(f"{token}\n" for token in TOKENS))
    import_weights(
        f"{folder}/weights.pt", format_name, f"{folder}/imported", overrides, vocabulary=str(vocabulary), **more
    )
    return f"{folder}/imported"


def test_incomplete_head_is_not_used_for_prediction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = FORMATS["vlmo"].write(build_model(RELATIVE, len(TOKENS)).state_dict(), RELATIVE)
    del state["itc_vl_image_proj.fc.weight"], state["itm_score.fc.bias"]
    out = imported(state, "vlmo", tmp_path, *SHORT, may_differ=("itc_vl_*", "itm_*"))
    stage = load_weights(Storage(), out).config.stages[-1]
    assert set(stage.objectives) == {"mlm"}
    with pytest.raises(ConfigError, match="nothing can be predicted"):
        predict(out, photos(tmp_path)[0], None, TEXT)


def test_objective_whose_head_is_missing_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = FORMATS["vlmo"].write(build_model(RELATIVE, len(TOKENS)).state_dict(), RELATIVE)
    weights = load_weights(Storage(), imported(state, "vlmo", tmp_path, *SHORT))
    tensors = {n: t for n, t in weights.tensors.items() if n != "itc_head.image_vl.weight"}
    metadata = {"config": weights.config.model_dump(mode="json"), "stage": weights.stage, "step": 0}
    save_weights(Storage(), f"{tmp_path}/cut", tensors, TOKENS, metadata)
    found = load_usable_weights(Storage(), f"{tmp_path}/cut")
    assert set(found.config.stage_named(found.stage).objectives) == {"itm", "mlm"}
    assert "no complete head for itc" in caplog.text


def test_model_with_one_itc_head_starts_from_one_with_two(tmp_path: Path) -> None:
    both, one = build_model(RELATIVE, len(TOKENS)), build_model(RETRIEVAL, len(TOKENS))
    load_matching(one, one.resize_state(dict(both.state_dict()), RELATIVE), "retrieval")
    image, text = torch.rand(2, 24, 24, 3), torch.tensor([[2, 5, 3], [2, 6, 3]])
    passes = {"image": ForwardInput(heads=("itc",), image=image), "text": ForwardInput(heads=("itc",), text=text)}
    for name, outputs in one.eval()(passes).items():
        assert outputs.keys() == {"itc", "scale"}
        torch.testing.assert_close(outputs["itc"], both.eval()(passes)[name]["itc"])
    used = modules_for(one, "itc", "pairs")
    assert used is not None
    (one(passes)["image"]["itc"].sum() + one(passes)["text"]["itc"].sum() + one(passes)["image"]["scale"]).backward()
    assert {one.part_of(n) for n, p in one.named_parameters() if p.grad is not None} == used


def published_folder(name: str, folder: Path, layout: str = "folder") -> tuple[Case, str, Path]:
    """Publish a case below `folder`; return it, the path to import, and the folder of its files."""
    case = CASES[name]
    return case, publish(case.make(), case, folder / "published", layout), folder / "published"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("overrides", "message"), [((), "heads=1 assumed (width/64); give heads=N"), (("heads=3",), "")]
)
@pytest.mark.parametrize("name", ["BERT, bare", "ViT, bare", "ViLT of Hugging Face, retrieval", "ViLT, VQA"])
def test_assumed_number_of_heads_is_logged(
    name: str,
    overrides: tuple[str, ...],
    message: str,
    tmp_path: Path,
    vocabulary: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    case, path, folder = published_folder(name, tmp_path, "file")
    (folder / "config.json").unlink(missing_ok=True)
    import_weights(path, case.format, f"{tmp_path}/out", overrides, vocabulary=vocabulary)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("heads=")]
    assert [line[: len(message)] for line in lines] == ([message] if message else [])
    assert load_weights(Storage(), f"{tmp_path}/out").config.model.heads == (3 if overrides else 1)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ViT, classes", {"model_type": "roberta"}, "model_type is 'roberta', this format reads 'vit'"),
        ("ViT, classes", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("ViT, classes", {"num_hidden_layers": 12}, "num_hidden_layers is 12, the tensors have 3"),
        ("ViT, classes", {"num_attention_heads": 7}, "width 24 must be a multiple of heads 7"),
        ("ViT, classes", {"num_attention_heads": "many"}, "heads"),
        ("ViT, classes", {"layer_norm_eps": -1}, "norm_eps"),
        ("ViLT of Hugging Face, NLVR2", {"id2label": {"0": "True", "1": "False"}}, "0 is 'True'"),
        *(
            ("ViLT of Hugging Face, VQA", {key: 10**9}, "")
            for key in ("num_hidden_layers", "num_attention_heads", "image_size", "max_position_embeddings")
        ),
    ],
)
def test_unsupported_hugging_face_config_is_rejected(
    name: str, wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case, path, folder = published_folder(name, tmp_path)
    change(folder / "config.json", **wrong)
    with pytest.raises((ConfigError, CheckpointError)) as error:
        import_weights(path, case.format, f"{tmp_path}/out")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("processor", "expected"), [({"resample": 2}, "bilinear"), ({"resample": 3}, "bicubic"), ({}, "bilinear")]
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_interpolation_is_read_from_the_processor_config(
    processor: dict[str, int], expected: str, file: str, tmp_path: Path
) -> None:
    _, path, folder = published_folder("ViT, classes", tmp_path)
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **processor}
    (folder / file).write_text(json.dumps(values if file.startswith("pre") else {"image_processor": values}))
    import_weights(path, "vit", f"{tmp_path}/out")
    assert load_weights(Storage(), f"{tmp_path}/out").config.model.interpolation == expected


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("number", [1, 1000])
def test_tensors_of_unsupported_dtype_are_rejected(kind: torch.dtype, number: int, tmp_path: Path) -> None:
    _, path, _ = published_folder("ViT, classes", tmp_path, "file")
    state = safetensors.torch.load_file(path)
    quantised = {name: (10 * tensor).to(kind) for name, tensor in list(state.items())[:number]}
    safetensors.torch.save_file({**state, **quantised}, path)
    with pytest.raises(CheckpointError, match="floating-point"):
        import_weights(path, "vit", f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


WRONG_NAMES = [[7], {}, 1.5, True, "7", "\ud83d", "c\nd", None]


@pytest.mark.parametrize("wrong", WRONG_NAMES)
def test_unusable_token_leaves_nothing(wrong: Any, tmp_path: Path) -> None:
    case, path, folder = published_folder("BERT, bare", tmp_path)
    (folder / "vocab.txt").unlink()
    ids: dict[str, Any] = {token: number for number, token in enumerate(TOKENS)}
    last = ids.pop(TOKENS[-1])
    ids |= {wrong: last} if wrong in ("\ud83d", "c\nd") else {TOKENS[-1]: wrong}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": ids}}))
    with pytest.raises(MomeError):
        import_weights(path, case.format, f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", WRONG_NAMES)
def test_unusable_label_is_dropped_or_leaves_nothing(wrong: Any, tmp_path: Path) -> None:
    case, path, folder = published_folder("ViT, classes", tmp_path)
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    change(folder / "config.json", id2label={**labels, "0": wrong})
    is_refused = wrong == "\ud83d"  # no UTF-8 text
    with pytest.raises(MomeError) if is_refused else nullcontext():
        import_weights(path, case.format, f"{tmp_path}/out")
    assert (tmp_path / "out").exists() != is_refused


@pytest.mark.parametrize("name", ["weights.safetensors", "vocab.txt", "MANIFEST.json", "answers.json"])
def test_import_replaces_no_file(name: str, tmp_path: Path) -> None:
    case, path, folder = published_folder("BERT, bare", tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    for out in (tmp_path / "out", folder):  # the folder of the checkpoint itself contains vocab.txt
        with pytest.raises(ConfigError, match="--out"):
            import_weights(path, case.format, str(out))
    assert [file.name for file in (tmp_path / "out").iterdir()] == [name]
    assert (folder / "vocab.txt").exists()


@pytest.mark.parametrize("header", ["vit-base", "[1]", "{}", '{"name": "x"}'])
def test_foreign_header_is_not_read_as_a_model_section(header: str, tmp_path: Path, vocabulary: str) -> None:
    state = FORMATS["vilt"].write(build_model(RELEASED_VILT, len(TOKENS)).state_dict(), RELEASED_VILT)
    safetensors.torch.save_file(state, tmp_path / "w.safetensors", {"model": header})
    import_weights(f"{tmp_path}/w.safetensors", "vilt", f"{tmp_path}/out", ["heads=3"], vocabulary=vocabulary)


@pytest.mark.parametrize("format_name", ["vilt", "vilt-hf"])
@pytest.mark.parametrize(("short", "longest"), [(384, 639), (224, 373), (600, 999)])
def test_imported_vilt_reads_the_releases_longest_side(format_name: str, short: int, longest: int) -> None:
    """int(1333 / 800 * short) in the release and in Hugging Face's processor; the paper's 640 is our default."""
    with torch.device("meta"):
        section = ViLTConfig(**{**OURS, "image_size": short // 8 * 8, "longest_side": 1000, "max_text_length": 10})
        state = skeleton(section, len(TOKENS)).state_dict()
    inferred = FORMATS[format_name].infer(FORMATS[format_name].write(state, section), {"heads": 3})
    assert inferred["longest_side"] == longest
    assert ViLTConfig().longest_side == 640


ANSWER_FILES = {
    "a list": json.dumps(ANSWERS),
    "numbers of answers": json.dumps({answer: number for number, answer in enumerate(ANSWERS)}),
    "answers of numbers": json.dumps({str(number): answer for number, answer in enumerate(ANSWERS)}),
    "one a line": "\ufeff" + "\r\n".join(ANSWERS) + "\r\n\r\n",
}


def import_vilt(folder: Path, answers: int | None, content: str | bytes | None) -> Weights:
    """Import a ViLT with this number of answers, and this file of answers."""
    if content is not None:
        (folder / "answers").write_bytes(content.encode() if isinstance(content, str) else content)
    model = build_model(RELEASED_VILT, len(TOKENS), HeadConfig(answers=answers))
    state = FORMATS["vilt"].write(model.state_dict(), RELEASED_VILT)
    return load_weights(Storage(), imported(state, "vilt", folder, "heads=3", answers=f"{folder}/answers"))


@pytest.mark.parametrize("kind", ANSWER_FILES)
def test_answers_are_read_in_every_common_format(kind: str, tmp_path: Path) -> None:
    assert list(import_vilt(tmp_path, 5, ANSWER_FILES[kind]).choices["answers.json"].names) == ANSWERS


@pytest.mark.parametrize(
    ("content", "outputs", "message"),
    [
        (json.dumps(ANSWERS[:4]), 5, "names 4, the head has 5 outputs"),
        (json.dumps([*ANSWERS[:4], "yes"]), 5, "'yes' is listed more than once"),
        (json.dumps({"yes": 0, "no": 7}), 5, "expected a JSON list"),
        ("[1, 2", 5, "is no JSON"),
        (b"\xff\xfe", 5, "is no UTF-8"),
        (None, 5, "no such file"),
        (json.dumps(ANSWERS), None, "answer no questions"),
    ],
)
def test_invalid_answers_are_rejected(
    content: str | bytes | None, outputs: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        import_vilt(tmp_path, outputs, content)


def test_a_folder_is_read_from_any_storage(tmp_path: Path) -> None:
    _, _, folder = published_folder("BERT, masked words", tmp_path, "shards")
    storage, url = Storage(), f"memory://hub/copy-{tmp_path.name}"
    for file in folder.iterdir():
        storage.write(f"{url}/{file.name}", file.read_bytes())
    import_weights(f"{url}/", "bert", f"{tmp_path}/out")
    assert load_weights(storage, f"{tmp_path}/out").config.model.heads == 3


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("missing.safetensors", "missing"),
        ("../../weights.pt", "files of the same folder"),
        ("/etc/passwd", "files of the same folder"),
        (7, "files of the same folder"),
    ],
)
def test_index_that_names_other_files_is_rejected(file: Any, message: str, tmp_path: Path) -> None:
    _, path, folder = published_folder("BERT, masked words", tmp_path, "shards")
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    change(index, weight_map={**files, "bert.embeddings.LayerNorm.bias": file})
    with pytest.raises(CheckpointError, match=message):
        import_weights(path, "bert", f"{tmp_path}/out")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}'])
def test_damaged_index_is_reported(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        import_weights(str(tmp_path), "bert", f"{tmp_path}/out")


@pytest.mark.parametrize("name", ["BERT, masked words", "ViLT of Hugging Face, VQA", "BEiT, pretrained"])
def test_mutated_folders_raise_only_mome_errors(name: str, tmp_path: Path) -> None:
    """Mutate every file that the import reads. A mutation that only changes a number may be imported."""
    case, _, folder = published_folder(name, tmp_path, "shards")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    rng, escaped = random.Random(f"folders {name}"), []
    for number in range(fuzz_rounds(25)):
        target = rng.choice(sorted(whole))
        (folder / target).write_bytes(mutate(whole[target], rng))
        try:
            import_weights(str(folder), case.format, f"{tmp_path}/out-{number}")
        except MomeError:
            pass
        except Exception as error:
            escaped.append(f"{target}: {type(error).__name__}: {error}")
        (folder / target).write_bytes(whole[target])
    assert escaped == []


def test_header_that_claims_a_billion_layers_is_rejected(tmp_path: Path) -> None:
    section = RELEASED_VILT.model_copy(update={"layers": 10**9})
    state = skeleton(RELEASED_VILT, len(TOKENS)).state_dict()
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors", {"model": section.model_dump_json()})
    for format_name in ("safetensors", "vilt"):
        with pytest.raises((CheckpointError, ConfigError), match=r"layers are claimed|no ViLT"):
            import_weights(f"{tmp_path}/w.safetensors", format_name, f"{tmp_path}/out")
