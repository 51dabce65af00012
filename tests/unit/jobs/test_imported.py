"""Every published task checkpoint, imported from a file and from a folder, predicts what it did where it was made.

Tiny models with random weights stand for the published ones: Hugging Face's own classes (contract C8), and for the
releases' formats, whose code is no package, our models, which tests/golden holds to the releases.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
from jobs.evaluate import model_of
from jobs.predict import predict
from pipeline.config.errors import ConfigError
from pipeline.config.model import TransformerConfig, ViLTConfig, VLMoConfig
from pipeline.data.contents.images import decode, resize_for
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.models.checkpoints import FORMATS
from pipeline.models.model import Heads
from pipeline.models.passes import Pass
from pipeline.training.checkpoint import Weights, load_weights

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
TEXT, MASKED = "a b c d", "a [MASK] c"
ANSWERS = ["yes", "no", "2", "a cat", "blue"]
LABELS = ["crane", "dog", "crane", "cat", "bird", "tree"]
EPSILON = 1e-3  # large enough for a forgotten one to be seen
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
    """A published checkpoint: its format, how it is made, and what it predicts, by its own code."""

    format: str
    make: Callable[[], Any]  # a model of Hugging Face, or a section and heads of ours
    expected: Callable[[Any, Asked], Any]
    given: tuple[int, str | None] = (1, TEXT)  # pictures and a text
    overrides: tuple[str, ...] = ()
    answers: bool = False  # whether --answers is needed


@dataclass(frozen=True)
class Asked:
    """What a prediction is asked about, as tensors of the model's own code."""

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


def masked(logits: Tensor, asked: Asked) -> dict[str, Any]:
    (place,) = (asked.ids[0] == TOKENS.index("[MASK]")).nonzero().flatten()
    return {"words": [ranked(logits[0, place].softmax(0), TOKENS)]}


def same_tokens(model: Any, asked: Asked, heads: str) -> None:
    """No objective of these checkpoints predicts anything: what they share is the encoder."""
    image = asked.pixels[0]
    found = model_of(asked.weights).eval()({"x": Pass(heads=("tokens",), image=image.permute(0, 2, 3, 1))})["x"][
        "tokens"
    ]
    hidden = model(image).last_hidden_state if heads == "bare" else model.beit(image).last_hidden_state
    if heads == "pooler":
        hidden = model.beit.pooler.layernorm(hidden)
    torch.testing.assert_close(found, hidden, rtol=1e-5, atol=1e-5)


def same_visual_tokens(model: Any, asked: Asked) -> None:
    image, places = asked.pixels[0], torch.tensor([[0, 3, 5]])
    covered = torch.zeros(1, 9, dtype=torch.bool).scatter(1, places, True)
    one = Pass(heads=("masked_image",), image=image.permute(0, 2, 3, 1), patch_positions=places)
    found = model_of(asked.weights).eval()({"x": one})["x"]["masked_image"]
    expected = model(image, bool_masked_pos=covered).logits[:, places[0]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    stage = asked.weights.config.stage_named(asked.weights.stage)
    assert (stage.image_target, stage.image_tokenizer.tokens) == ("visual_tokens", 192)  # type: ignore[union-attr]


def same_words(model: Any, asked: Asked) -> None:
    found = model_of(asked.weights).eval()({"x": Pass(heads=("tokens",), text=asked.ids)})["x"]["tokens"]
    torch.testing.assert_close(found, model(**asked.words).last_hidden_state, rtol=1e-5, atol=1e-5)


def our_release(section: TransformerConfig, heads: Heads = Heads(), drop: tuple[str, ...] = ()) -> Callable[[], Any]:
    def make() -> Any:
        model = randomised(build_model(section, len(TOKENS), heads))
        model.dropped = drop  # type: ignore[assignment]
        return model

    return make


def our_own(model: Any, asked: Asked, *heads: str) -> dict[str, Any]:
    """What our model, before it was written in a release's format, says of the same input."""
    images = [pixels.permute(0, 2, 3, 1) for pixels in asked.pixels]
    second = {"second_image": images[1]} if len(images) > 1 else {}
    text: dict[str, Any] = {} if not asked.ids.numel() else {"text": asked.ids}
    fused = {**second, **text, "image": images[0]}
    found: dict[str, Any] = {}
    for head in heads:
        if head == "itc":
            image, said = (
                model({"x": Pass(heads=("itc",), **each)})["x"] for each in ({"image": images[0]}, dict(text))
            )
            names = [name for name in ("itc", "itc_vl") if name in image]
            cosines = [(image[name] @ said[name].T).item() for name in names]
            found["similarity"] = pytest.approx(sum(cosines) / len(names), abs=2e-5)
            continue
        out = model({"x": Pass(heads=(head,), **fused)})["x"][head][0]  # type: ignore[arg-type]
        found |= {
            "itm": lambda out=out: {"matched": pytest.approx(out.softmax(0)[1].item(), abs=2e-5)},
            "answers": lambda out=out: {"answers": ranked(out.sigmoid(), ANSWERS)},
            "reasoning": lambda out=out: {"true": pytest.approx(out.softmax(0)[1].item(), abs=2e-5)},
            "ranking": lambda out=out: {"ranking": pytest.approx(out.item(), abs=2e-4)},
        }[head]()
    return found


OURS = {"width": 24, "layers": 3, "heads": 3, "image_size": 24, "patch_size": 8}
RELATIVE = VLMoConfig(**OURS, vision_language_layers=1, max_text=10)
ABSOLUTE = VLMoConfig(**OURS, vision_language_layers=1, max_text=10, positions="absolute", layer_scale=None)
RETRIEVAL = RELATIVE.model_copy(update={"contrasts": 1})
RELEASED_VILT = ViLTConfig(**OURS, longest_side=39, max_text=10)
SHORT = ("max_text=10",)

CASES = {
    "BERT, pretrained": Case(
        "bert",
        hugging_face("BertForPreTraining", "BertConfig", **SIZES, vocab_size=len(TOKENS), layer_norm_eps=EPSILON,
                     max_position_embeddings=20),
        lambda model, asked: masked(model(**asked.words).prediction_logits, asked),
        given=(0, MASKED),
    ),
    "BERT, masked words": Case(
        "bert",
        hugging_face("BertForMaskedLM", "BertConfig", **SIZES, vocab_size=len(TOKENS)),
        lambda model, asked: masked(model(**asked.words).logits, asked),
        given=(0, MASKED),
    ),
    "BERT, bare": Case(
        "bert", hugging_face("BertModel", "BertConfig", **SIZES, vocab_size=len(TOKENS), layer_norm_eps=EPSILON),
        same_words, given=(0, TEXT),
    ),
    "ViT, bare": Case(
        "vit", hugging_face("ViTModel", "ViTConfig", **PICTURES, qkv_bias=False),
        lambda model, asked: same_tokens(model, asked, "bare"), given=(1, None),
    ),
    "ViT, classes": Case(
        "vit",
        hugging_face("ViTForImageClassification", "ViTConfig", **PICTURES, **numbered(LABELS)),
        lambda model, asked: {
            "classes": ranked(model(asked.pixels[0]).logits[0].softmax(0), [*LABELS[:2], "crane (2)", *LABELS[3:]])
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
        lambda model, asked: same_tokens(model, asked, "pooler"), given=(1, None),
    ),
    "BEiT, bare": Case(
        "beit",
        hugging_face("BeitModel", "BeitConfig", **PICTURES, use_relative_position_bias=True, use_mean_pooling=False),
        lambda model, asked: same_tokens(model, asked, "bare"), given=(1, None),
    ),
    "BEiT, absolute positions": Case(
        "beit",
        hugging_face("BeitModel", "BeitConfig", **PICTURES, use_absolute_position_embeddings=True,
                     use_mean_pooling=False),
        lambda model, asked: same_tokens(model, asked, "bare"), given=(1, None),
    ),
    "ViLT of Hugging Face, masked words": Case(
        "vilt-hf", hugging_face("ViltForMaskedLM", "ViltConfig", **VILT),
        lambda model, asked: masked(model(**asked.both).logits, asked), given=(1, MASKED),
    ),
    "ViLT of Hugging Face, VQA": Case(
        "vilt-hf", hugging_face("ViltForQuestionAnswering", "ViltConfig", **VILT, **numbered(ANSWERS)),
        lambda model, asked: {"answers": ranked(model(**asked.both).logits[0].sigmoid(), ANSWERS)},
    ),
    "ViLT of Hugging Face, NLVR2": Case(
        "vilt-hf",
        hugging_face("ViltForImagesAndTextClassification", "ViltConfig", **VILT, num_images=2,
                     modality_type_vocab_size=3, id2label={0: "False", 1: "True"}),
        lambda model, asked: {
            "true": pytest.approx(
                model(**asked.words, pixel_values=torch.stack(asked.pixels, 1)).logits[0].softmax(0)[1].item(), abs=2e-5
            )
        },
        given=(2, TEXT),
    ),
    "ViLT of Hugging Face, retrieval": Case(
        "vilt-hf", hugging_face("ViltForImageAndTextRetrieval", "ViltConfig", **VILT, qkv_bias=False),
        lambda model, asked: {"ranking": pytest.approx(model(**asked.both).logits.item(), abs=2e-4)},
    ),
    "ViLT, pretrained": Case(
        "vilt", our_release(RELEASED_VILT), lambda model, asked: our_own(model, asked, "itm"), overrides=("heads=3",)
    ),
    "ViLT, VQA": Case(
        "vilt", our_release(RELEASED_VILT, Heads(answers=5), ("itm", "mlm")),
        lambda model, asked: our_own(model, asked, "answers"), overrides=("heads=3",), answers=True,
    ),
    "ViLT, NLVR2": Case(
        "vilt", our_release(RELEASED_VILT, Heads(reasoning=True), ("itm", "mlm")),
        lambda model, asked: our_own(model, asked, "reasoning"), given=(2, TEXT), overrides=("heads=3",),
    ),
    "ViLT, retrieval": Case(
        "vilt", our_release(RELEASED_VILT, Heads(ranking=True), ("mlm",)),
        lambda model, asked: our_own(model, asked, "itm", "ranking"), overrides=("heads=3",),
    ),
    "VLMo, pretrained": Case(
        "vlmo", our_release(RELATIVE), lambda model, asked: our_own(model, asked, "itc", "itm"), overrides=SHORT
    ),
    "VLMo of absolute positions, pretrained": Case(
        "vlmo", our_release(ABSOLUTE), lambda model, asked: our_own(model, asked, "itc", "itm"), overrides=("heads=3",)
    ),
    "VLMo, retrieval": Case(
        "vlmo", our_release(RETRIEVAL, drop=("itm", "mlm", "pooler")),
        lambda model, asked: our_own(model, asked, "itc"), overrides=SHORT,
    ),
    "VLMo, VQA": Case(
        "vlmo", our_release(RELATIVE, Heads(answers=5), ("itm", "mlm", "itc", "logit")),
        lambda model, asked: our_own(model, asked, "answers"), overrides=SHORT, answers=True,
    ),
    "VLMo, NLVR2": Case(
        "vlmo", our_release(RELATIVE, Heads(reasoning=True), ("itm", "mlm", "itc", "logit")),
        lambda model, asked: our_own(model, asked, "reasoning"), given=(2, TEXT), overrides=SHORT,
    ),
}  # fmt: skip


def publish(model: Any, case: Case, folder: Path, layout: str) -> str:
    """Write a checkpoint as it is published; what to give to `mome import`."""
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


def asked_of(weights: Weights, images: list[str], text: str | None) -> Asked:
    pixels = []
    for path in images:
        image = resize_for(decode(Path(path).read_bytes(), 10**6), weights.config.model)
        pixels.append(torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1)
    tokens = [] if text is None else [4 if word == "[MASK]" else TOKENS.index(word) for word in text.split()]
    ids = torch.tensor([[2, *tokens, 3]]) if tokens else torch.zeros(1, 0, dtype=torch.int64)
    return Asked(tuple(pixels), ids, weights)


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    return str(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, case in CASES.items() for layout in ("file", "folder", "shards", "bin")
     if layout != "shards" or case.format in ("bert", "vit", "beit", "vilt-hf")],
)  # fmt: skip
@torch.no_grad()
def test_a_published_checkpoint_predicts_what_it_did(name: str, layout: str, tmp_path: Path, vocabulary: str) -> None:
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
    images = photos(tmp_path)[:1] * count  # of one shape, as their code reads a batch
    expected = case.expected(model, asked_of(weights, images, text))
    one, two = (*images, None, None)[:2]
    if expected is None:
        with pytest.raises(ConfigError, match="nothing can be predicted"):
            predict(out, one, two, text)
    else:
        found = predict(out, one, two, text, top=100)
        assert {key: found[key] for key in expected} == expected
        # What is exported and imported again predicts the same (B6), in both kinds of file.
        for ending in ("pt", "safetensors"):
            export_weights(out, case.format, f"{tmp_path}/again.{ending}")
            import_weights(f"{tmp_path}/again.{ending}", case.format, f"{out}-{ending}", vocabulary=vocabulary)
            again = predict(f"{out}-{ending}", one, two, text, top=100)
            assert {key: again[key] for key in expected} == {key: found[key] for key in expected}
