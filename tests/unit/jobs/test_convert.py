"""`mome import` and `mome export`: published checkpoints predict like their original code, and unusable ones are named.

The checkpoints are tiny models with random weights: of Hugging Face's own classes (contract C8), and for releases
whose code is not packaged, the tensors of our models, which tests/golden compares with the released code.
"""

import json
import random
import re
from contextlib import nullcontext, suppress
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
from typer.testing import CliRunner

from jobs.cli import Format, app
from jobs.convert import export_weights, import_weights
from jobs.predict import predict
from pipeline.config.errors import CheckpointError, ConfigError, MomeError
from pipeline.config.schema import ViLTConfig, VLMoConfig
from pipeline.data.contents.images import decode, resize, shape_of
from pipeline.data.storage import Storage
from pipeline.inference import build_trained_model, drop_untrained_objectives
from pipeline.models import build_model, skeleton
from pipeline.models.checkpoints.formats import FORMATS
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.objectives import modules_for
from pipeline.training.checkpoint.weights import Weights, load_weights, save_weights
from pipeline.training.stages import load_matching
from tests.support.forwards import randomised
from tests.support.fuzz import fuzz_rounds, mutate

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
TEXT, MASKED = "a b c d", "a [MASK] c"
ANSWERS = ["yes", "no", "2", "a cat", "blue"]
LABELS = ["crane", "dog", "crane", "cat", "bird", "tree"]
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
IMAGES = {**SIZES, "image_size": 24, "patch_size": 8, "layer_norm_eps": 1e-3}
VILT = {**IMAGES, "vocab_size": len(TOKENS), "max_position_embeddings": 10}
OURS: dict[str, Any] = {"width": 24, "layers": 3, "heads": 3, "image_size": 24, "patch_size": 8}
RELATIVE = VLMoConfig(**OURS, vision_language_layers=1, max_text_length=10)
ABSOLUTE = RELATIVE.model_copy(update={"positions": "absolute", "layer_scale": None})
RETRIEVAL = RELATIVE.model_copy(update={"contrasts": 1})
RELEASED_VILT = ViLTConfig(**OURS, longest_side=39, max_text_length=10)
TWO = {"num_images": 2, "modality_type_vocab_size": 3, "id2label": {0: "False", 1: "True"}}
TASK = ("itm", "mlm", "itc", "logit")  # heads that a fine-tuned release lacks


def numbered(names: list[str]) -> dict[str, Any]:
    return {"num_labels": len(names), "id2label": dict(enumerate(names))}


def near(tensor: Tensor) -> Any:
    return pytest.approx(tensor.item(), abs=2e-5)


def ranked(probabilities: Tensor, names: list[str]) -> dict[str, Any]:
    return {name: near(probabilities[number]) for number, name in enumerate(names)}


@dataclass(frozen=True)
class Case:
    """A checkpoint of Hugging Face's class `kind`, and the inputs of its prediction."""

    format: str
    kind: str
    sizes: dict[str, Any]
    images: int = 1
    text: str | None = TEXT

    def predictions(self, model: Any, images: list[Tensor], ids: Tensor) -> dict[str, Any]:
        """Return what the original model predicts for images (1, 3, H, W) and tokens (1, L)."""
        if self.kind == "ViTForImageClassification":
            probabilities = model(images[0]).logits[0].softmax(0)
            return {"classes": ranked(probabilities, [*LABELS[:2], "crane (2)", *LABELS[3:]])}
        if self.text is None:
            return {}
        pixels = {"pixel_values": images[0] if self.images == 1 else torch.stack(images, 1)} if images else {}
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits
        if self.kind == "ViltForQuestionAnswering":
            return {"answers": ranked(logits[0].sigmoid(), ANSWERS)}
        if self.kind == "ViltForImagesAndTextClassification":
            return {"true": near(logits[0].softmax(0)[1])}
        if self.kind == "ViltForImageAndTextRetrieval":
            return {"ranking": pytest.approx(logits.item(), abs=2e-4)}
        (place,) = (ids[0] == TOKENS.index("[MASK]")).nonzero().flatten()
        return {"words": [ranked(logits[0, place].softmax(0), TOKENS)]}


PRETRAINED = IMAGES | {"vocab_size": 192, "use_mask_token": True, "use_shared_relative_position_bias": True}
CASES = {
    "BERT": Case("bert", "BertForMaskedLM", SIZES | {"vocab_size": len(TOKENS)}, images=0, text=MASKED),
    "ViT, bare": Case("vit", "ViTModel", IMAGES | {"qkv_bias": False}, text=None),
    "ViT, classes": Case("vit", "ViTForImageClassification", IMAGES | numbered(LABELS), text=None),
    "BEiT": Case("beit", "BeitForMaskedImageModeling", PRETRAINED, text=None),
    "ViLT, masked words": Case("vilt-hf", "ViltForMaskedLM", VILT, text=MASKED),
    "ViLT, VQA": Case("vilt-hf", "ViltForQuestionAnswering", VILT | numbered(ANSWERS)),
    "ViLT, NLVR2": Case("vilt-hf", "ViltForImagesAndTextClassification", VILT | TWO, images=2),
    "ViLT, retrieval": Case("vilt-hf", "ViltForImageAndTextRetrieval", VILT | {"qkv_bias": False}),
}
# Every case as a file and as a folder, and some in rarer forms.
LAYOUTS = [(name, layout) for layout in ("file", "folder") for name in CASES]
LAYOUTS += [("BERT", "bin"), ("BERT", "shards"), ("ViLT, VQA", "shards")]


def publish(name: str, folder: Path, layout: str = "folder") -> tuple[Case, Any, str, Path]:
    """Publish a case below `folder`; return it, its model, the path to import, and the folder of its files."""
    case, folder = CASES[name], folder / "published"
    config = {"vit": "ViT", "bei": "Beit", "ber": "Bert", "vil": "Vilt"}[case.format[:3]] + "Config"
    model = randomised(getattr(transformers, case.kind)(getattr(transformers, config)(**case.sizes)))
    folder.mkdir(parents=True)
    model.save_pretrained(folder, max_shard_size="30KB" if layout == "shards" else "1GB")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    assert (folder / "model.safetensors.index.json").exists() == (layout == "shards")
    if layout == "bin":
        torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return case, model, str(folder / "model.safetensors") if layout == "file" else str(folder), folder


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    return str(tmp_path / "one.png")


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    return str(tmp_path / "vocab.txt")


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@torch.no_grad()
def test_imported_checkpoint_predicts_like_the_original(
    name: str, layout: str, tmp_path: Path, vocabulary: str, photo: str
) -> None:
    case, model, path, _ = publish(name, tmp_path, layout)
    out = f"{tmp_path}/imported"
    import_weights(path, case.format, out)
    weights = load_weights(Storage(), out)
    model = weights.config.model
    resized = resize(decode(Path(photo).read_bytes(), 10**6), shape_of(model), model.interpolation)
    pixels = torch.tensor(resized) / 127.5 - 1
    tokens = [TOKENS.index(word) for word in (case.text or "").split()]
    expected = case.predictions(model, [pixels.permute(2, 0, 1)[None]] * case.images, torch.tensor([[2, *tokens, 3]]))
    one, two = [*[photo] * case.images, None, None][:2]
    if not expected:
        with pytest.raises(ConfigError, match="nothing can be predicted"):
            predict(out, one, two, case.text)
        if case.format == "beit":
            stage: Any = weights.config.stage_named(weights.stage)
            assert (stage.image_target, stage.image_tokenizer.tokens) == ("visual_tokens", 192)
        return
    first = predict(out, one, two, case.text, top=100)
    assert {key: first[key] for key in expected} == expected
    # Export and re-import give the same predictions (B6), in both file formats.
    for ending in ("pt", "safetensors") if layout == "file" else ():
        export_weights(out, case.format, f"{tmp_path}/again.{ending}")
        import_weights(f"{tmp_path}/again.{ending}", case.format, f"{out}-{ending}", vocabulary=vocabulary)
        again = predict(f"{out}-{ending}", one, two, case.text, top=100)
        assert {key: again[key] for key in expected} == {key: first[key] for key in expected}


# ---- tensors


def vlmo(heads: HeadConfig = HeadConfig()) -> dict[str, Tensor]:
    return FORMATS["vlmo"].write(build_model(RELATIVE, len(TOKENS), heads, seed=5).state_dict(), RELATIVE)


def imported(state: Any, folder: Path, *overrides: str, format_name: str = "vlmo", **more: Any) -> Weights:
    """Import a file of these contents to `folder`/imported and return the weights."""
    torch.save(state, folder / "weights.pt")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    sizes = [*(["max_text_length=10"] if format_name == "vlmo" else ["heads=3"]), *overrides]
    more = {"vocabulary": f"{folder}/vocab.txt", **more}
    import_weights(f"{folder}/weights.pt", format_name, f"{folder}/imported", sizes, **more)
    return load_weights(Storage(), f"{folder}/imported")


RELEASED = [  # section, heads, beginnings of names that the release lacks, objectives of its weights
    (RELEASED_VILT, HeadConfig(), (), {"itm", "mlm"}),
    (RELEASED_VILT, HeadConfig(answers=5), ("itm", "mlm"), {"vqa"}),
    (RELEASED_VILT, HeadConfig(nlvr2=True), ("itm", "mlm"), {"nlvr2"}),
    (RELEASED_VILT, HeadConfig(ranking=True), ("mlm",), {"itm", "ranking"}),
    (RELATIVE, HeadConfig(), (), {"itc", "itm", "mlm"}),
    (ABSOLUTE, HeadConfig(), (), {"itc", "itm", "mlm"}),
    (RETRIEVAL, HeadConfig(), ("itm", "mlm", "pooler"), {"itc"}),
    (RELATIVE, HeadConfig(answers=5), TASK, {"vqa"}),
    (RELATIVE, HeadConfig(nlvr2=True), TASK, {"nlvr2"}),
]


@pytest.mark.parametrize(("section", "heads", "lacks", "objectives"), RELEASED)
def test_release_is_imported_bit_equal_with_the_objectives_of_its_heads(
    section: Any, heads: HeadConfig, lacks: tuple[str, ...], objectives: set[str], tmp_path: Path
) -> None:
    own = randomised(build_model(section, len(TOKENS), heads)).state_dict()  # type: ignore[arg-type]
    published = {
        n: t for n, t in FORMATS[section.kind].write(own, section).items() if not lacks or not n.startswith(lacks)
    }
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    listed = {"answers": f"{tmp_path}/answers.json"} if heads.answers else {}
    sizes = ["heads=3"] if section is ABSOLUTE else []
    weights = imported({"state_dict": published}, tmp_path, *sizes, format_name=section.kind, **listed)
    assert (weights.config.model, weights.absent) == (section, set())
    assert weights.tensors
    assert all(torch.equal(tensor, own[name]) for name, tensor in weights.tensors.items())
    assert set(weights.config.stage_named(weights.stage).objectives) == objectives
    # Export and re-import give the same weights (B6), in both file formats, without further arguments.
    for ending in ("pt", "safetensors"):
        again, vocabulary = f"{tmp_path}/again.{ending}", f"{tmp_path}/vocab.txt"
        assert export_weights(f"{tmp_path}/imported", section.kind, again)["left_out"] == []
        import_weights(again, section.kind, f"{tmp_path}/{ending}", vocabulary=vocabulary)
        second = load_weights(Storage(), f"{tmp_path}/{ending}")
        assert equal(second.tensors, weights.tensors)
        assert (second.config.model, second.config.stages) == (section, weights.config.stages)
        assert second.choices == weights.choices
    assert equal(torch.load(tmp_path / "again.pt", weights_only=True)["state_dict"], published)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_our_own_safetensors_need_no_sizes_and_show_what_formats_leave_out(tmp_path: Path, vocabulary: str) -> None:
    heads = HeadConfig("pixels", answers=5, nlvr2=True)
    model, own = build_model(RELATIVE, len(TOKENS), heads, seed=5), tmp_path / "own.safetensors"
    safetensors.torch.save_file(model.state_dict(), own, {"model": RELATIVE.model_dump_json()})
    import_weights(str(own), "safetensors", f"{tmp_path}/first", vocabulary=vocabulary)
    export_weights(f"{tmp_path}/first", "safetensors", f"{tmp_path}/again.safetensors")
    import_weights(f"{tmp_path}/again.safetensors", "safetensors", f"{tmp_path}/second", vocabulary=vocabulary)
    for name in ("first", "second"):
        weights = load_weights(Storage(), f"{tmp_path}/{name}")
        assert weights.config.model == RELATIVE
        assert (weights.stage, weights.config.stages[-2].num_answers) == ("imported_statements", 5)
        assert equal(build_trained_model(weights).state_dict(), model.state_dict())
    left_out = ["image_embedding.mask", "mim_head.predict.bias", "mim_head.predict.weight"]
    assert export_weights(f"{tmp_path}/first", "vlmo", f"{tmp_path}/out.pt")["left_out"] == left_out


def test_heads_and_experts_that_a_file_lacks_serve_no_objective(
    tmp_path: Path, photo: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = {n: t for n, t in vlmo().items() if "_vl" not in n and not n.startswith(("itc", "itm", "logit"))}
    (tmp_path / "stage").mkdir()
    assert imported(stage, tmp_path / "stage", "vision_language_layers=1").absent == {"vision_language_expert"}
    state = vlmo()
    del state["itc_vl_image_proj.fc.weight"], state["itm_score.fc.bias"]
    with pytest.raises(CheckpointError, match=r"missing: itc_vl_image_proj\.fc\.weight, itm_score\.fc\.bias"):
        imported(state, tmp_path)
    weights = imported(state, tmp_path, may_differ=("itc_vl_*", "itm_*"))
    assert {n for n in weights.tensors if n.startswith("itm_head.")} == {"itm_head.classify.weight"}
    assert set(weights.config.stages[-1].objectives) == {"mlm"}, "an incomplete head serves no objective"
    with pytest.raises(ConfigError, match="nothing can be predicted"):
        predict(f"{tmp_path}/imported", photo, None, TEXT)
    # Weights of a stage whose head was lost later.
    (tmp_path / "whole").mkdir()
    weights = imported(vlmo(), tmp_path / "whole")
    tensors = {n: t for n, t in weights.tensors.items() if n != "itc_head.image_vl.weight"}
    metadata = {"config": weights.config.model_dump(mode="json"), "stage": weights.stage, "step": 0}
    save_weights(Storage(), f"{tmp_path}/cut", tensors, TOKENS, metadata)
    usable = drop_untrained_objectives(load_weights(Storage(), f"{tmp_path}/cut"))
    assert set(usable.config.stage_named(usable.stage).objectives) == {"itm", "mlm"}
    assert "no complete head for itc" in caplog.text


def test_model_with_one_itc_head_starts_from_one_with_two() -> None:
    two, one = build_model(RELATIVE, len(TOKENS)), build_model(RETRIEVAL, len(TOKENS))
    load_matching(one, one.resize_state(dict(two.state_dict()), RELATIVE), "retrieval")
    image, text = torch.rand(2, 24, 24, 3), torch.tensor([[2, 5, 3], [2, 6, 3]])
    forwards = {"image": ForwardInput(("itc",), image=image), "text": ForwardInput(("itc",), text=text)}
    results = one(forwards)
    for name, outputs in results.items():
        assert outputs.keys() == {"itc", "scale"}
        torch.testing.assert_close(outputs["itc"], two(forwards)[name]["itc"])
    (results["image"]["itc"].sum() + results["text"]["itc"].sum() + results["image"]["scale"]).backward()
    trained = {one.part_of(n) for n, p in one.named_parameters() if p.grad is not None}
    assert trained == modules_for(one, "itc", "pairs")


# ---- what is read besides tensors


@pytest.mark.parametrize("name", ["BERT", "ViT, bare", "ViLT, retrieval"])
def test_assumed_number_of_heads_is_logged(
    name: str, tmp_path: Path, vocabulary: str, caplog: pytest.LogCaptureFixture
) -> None:
    case, _, path, folder = publish(name, tmp_path, "file")
    (folder / "config.json").unlink(missing_ok=True)
    for overrides, heads, logged in (([], 1, ["heads=1 assumed (width/64); give heads=N"]), (["heads=3"], 3, [])):
        caplog.clear()
        import_weights(path, case.format, f"{tmp_path}/{heads}", overrides, vocabulary=vocabulary)
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("heads=")]
        assert [line.removesuffix(" if that is wrong") for line in lines] == logged
        assert load_weights(Storage(), f"{tmp_path}/{heads}").config.model.heads == heads


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ViT, classes", {"model_type": "roberta"}, "model_type is 'roberta', this format reads 'vit'"),
        ("ViT, classes", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("ViT, classes", {"num_hidden_layers": 12}, "num_hidden_layers is 12, the tensors have 3"),
        ("ViT, classes", {"num_attention_heads": 7}, "width 24 must be a multiple of heads 7"),
        ("ViT, classes", {"num_attention_heads": "many"}, "heads"),
        ("ViT, classes", {"layer_norm_eps": -1}, "norm_eps"),
        ("ViLT, NLVR2", {"id2label": {"0": "True", "1": "False"}}, "0 is 'True'"),
        ("ViLT, VQA", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("ViLT, VQA", {"num_attention_heads": 10**9}, "multiple of heads"),
        ("ViLT, VQA", {"image_size": 10**9}, "image_size is 1000000000"),
        ("ViLT, VQA", {"max_position_embeddings": 10**9}, "max_position_embeddings is 1000000000"),
    ],
)
def test_unsupported_hugging_face_config_is_rejected(
    name: str, wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case, _, path, folder = publish(name, tmp_path)
    change(folder / "config.json", **wrong)
    with pytest.raises(ConfigError, match=re.escape(message)):
        import_weights(path, case.format, f"{tmp_path}/out")


def test_interpolation_is_read_from_the_processor_config_and_quantised_tensors_are_rejected(tmp_path: Path) -> None:
    _, _, path, folder = publish("ViT, classes", tmp_path)
    for resample, expected in (({"resample": 2}, "bilinear"), ({"resample": 3}, "bicubic"), ({}, "bilinear")):
        values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **resample}
        for file, contents in {"preprocessor_config": values, "processor_config": {"image_processor": values}}.items():
            (folder / f"{file}.json").write_text(json.dumps(contents))
            out = f"{tmp_path}/{expected}{len(resample)}{file}"
            import_weights(path, "vit", out)
            assert load_weights(Storage(), out).config.model.interpolation == expected
            (folder / f"{file}.json").unlink()
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for kind in (torch.int8, torch.bool, torch.complex64):
        for number in (1, 1000):
            quantised = {name: (10 * tensor).to(kind) for name, tensor in list(state.items())[:number]}
            safetensors.torch.save_file({**state, **quantised}, folder / "model.safetensors")
            with pytest.raises(CheckpointError, match="floating-point"):
                import_weights(path, "vit", f"{tmp_path}/out")
    assert not (tmp_path / "out").exists()


WRONG_NAMES = [[7], {}, 1.5, True, "7", "\ud83d", "c\nd", None]


def test_unusable_tokens_and_labels_are_rejected_or_dropped(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    case, _, path, folder = publish("BERT", tmp_path / "bert")
    (folder / "vocab.txt").unlink()
    for wrong in WRONG_NAMES:
        ids: dict[str, Any] = {token: number for number, token in enumerate(TOKENS[:-1])}
        ids |= {wrong: len(ids)} if wrong in ("\ud83d", "c\nd") else {TOKENS[-1]: wrong}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": ids}}))
        with pytest.raises(MomeError):
            import_weights(path, case.format, f"{tmp_path}/out")
        assert not (tmp_path / "out").exists(), wrong
    case, _, path, folder = publish("ViT, classes", tmp_path)
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    for number, wrong in enumerate(WRONG_NAMES):
        change(folder / "config.json", id2label={**labels, "0": wrong})
        with pytest.raises(MomeError) if wrong == "\ud83d" else nullcontext():  # no UTF-8 text
            import_weights(path, case.format, f"{tmp_path}/out{number}")
        assert (tmp_path / f"out{number}").exists() == (wrong != "\ud83d"), wrong


def test_import_replaces_no_file(tmp_path: Path) -> None:
    case, _, path, folder = publish("BERT", tmp_path)
    for name in ("weights.safetensors", "vocab.txt", "MANIFEST.json", "answers.json", "COMMIT.json"):
        out = tmp_path / name.replace(".", "_")
        out.mkdir()
        (out / name).write_text("mine")
        for target in (out, folder):  # the folder of the checkpoint itself contains vocab.txt
            with pytest.raises(ConfigError, match=r"--out .*which would be lost"):
                import_weights(path, case.format, str(target))
        assert [file.name for file in out.iterdir()] == [name]
    assert (folder / "vocab.txt").exists()
    imported(vlmo(), tmp_path)
    with pytest.raises(ConfigError, match="which would be lost"):
        imported(vlmo(), tmp_path)


def test_headers_of_others_are_no_model_section_and_ours_are_checked(tmp_path: Path, vocabulary: str) -> None:
    state = FORMATS["vilt"].write(build_model(RELEASED_VILT, len(TOKENS)).state_dict(), RELEASED_VILT)
    for number, header in enumerate(("vit-base", "[1]", "{}", '{"name": "x"}')):
        safetensors.torch.save_file(state, tmp_path / "w.safetensors", {"model": header})
        out = f"{tmp_path}/out{number}"
        import_weights(f"{tmp_path}/w.safetensors", "vilt", out, ["heads=3"], vocabulary=vocabulary)
    claimed = RELEASED_VILT.model_copy(update={"layers": 10**9})
    own = {n: torch.zeros(t.shape) for n, t in skeleton(RELEASED_VILT, len(TOKENS)).state_dict().items()}
    safetensors.torch.save_file(own, tmp_path / "w.safetensors", {"model": claimed.model_dump_json()})
    for format_name in ("safetensors", "vilt"):
        with pytest.raises((CheckpointError, ConfigError), match=r"layers are claimed|no ViLT"):
            import_weights(f"{tmp_path}/w.safetensors", format_name, f"{tmp_path}/out")


def test_answers_are_read_in_every_common_format_and_checked(tmp_path: Path) -> None:
    def names(content: str | bytes | None, answers: int | None = 5) -> list[str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        if content is not None:
            (folder / "answers").write_bytes(content.encode() if isinstance(content, str) else content)
        model = build_model(RELEASED_VILT, len(TOKENS), HeadConfig(answers=answers))
        state = FORMATS["vilt"].write(model.state_dict(), RELEASED_VILT)
        weights = imported(state, folder, format_name="vilt", answers=f"{folder}/answers")
        return list(weights.choices["answers.json"])

    for content in (
        json.dumps(ANSWERS),
        json.dumps({answer: number for number, answer in enumerate(ANSWERS)}),
        json.dumps({str(number): answer for number, answer in enumerate(ANSWERS)}),
        "\ufeff" + "\r\n".join(ANSWERS) + "\r\n\r\n",
    ):
        assert names(content) == ANSWERS
    wrong: list[tuple[str | bytes | None, int | None, str]] = [
        (json.dumps(ANSWERS[:4]), 5, "names 4, the head has 5 outputs"),
        (json.dumps([*ANSWERS[:4], "yes"]), 5, "'yes' is listed more than once"),
        (json.dumps({"yes": 0, "no": 7}), 5, "expected a JSON list"),
        ("[1, 2", 5, "is no JSON"),
        (b"\xff\xfe", 5, "is no UTF-8"),
        (None, 5, "no such file"),
        (json.dumps(ANSWERS), None, "answer no questions"),
    ]
    for invalid, outputs, message in wrong:
        with pytest.raises(ConfigError, match=message):
            names(invalid, outputs)


# ---- folders, files and arguments that cannot be used


def test_a_folder_is_read_from_any_storage_and_its_index_is_checked(tmp_path: Path) -> None:
    _, _, path, folder = publish("BERT", tmp_path, "shards")
    storage, url = Storage(), f"memory://hub/copy-{tmp_path.name}"
    for file in folder.iterdir():
        storage.write(f"{url}/{file.name}", file.read_bytes())
    import_weights(f"{url}/", "bert", f"{tmp_path}/out")
    assert load_weights(storage, f"{tmp_path}/out").config.model.heads == 3
    index = folder / "model.safetensors.index.json"
    files, other = json.loads(index.read_text())["weight_map"], "files of the same folder"
    wrong = {"missing.safetensors": "missing", "../../weights.pt": other, "/etc/passwd": other, 7: other, "..": other}
    for file_name, message in wrong.items():
        change(index, weight_map={**files, "bert.embeddings.LayerNorm.bias": file_name})
        with pytest.raises(CheckpointError, match=message):
            import_weights(path, "bert", f"{tmp_path}/other")
    for content in (b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}'):
        index.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            import_weights(path, "bert", f"{tmp_path}/other")


@pytest.mark.parametrize("name", ["BERT", "ViLT, VQA", "BEiT"])
def test_mutated_folders_raise_only_mome_errors(name: str, tmp_path: Path) -> None:
    """Mutate every file that the import reads. A mutation that only changes a number may be imported."""
    case, _, _, folder = publish(name, tmp_path, "shards")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    rng = random.Random(f"folders {name}")
    for number in range(fuzz_rounds(25)):
        target = rng.choice(sorted(whole))
        (folder / target).write_bytes(mutate(whole[target], rng))
        with suppress(MomeError):
            import_weights(str(folder), case.format, f"{tmp_path}/out-{number}")
        (folder / target).write_bytes(whole[target])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format_name": "onnx"}, "--format onnx: unknown; known: vlmo"),
        ({"overrides": ["max_text_length=10"], "vocabulary": None}, "--vocabulary"),
        ({"overrides": ["max_text_length=10", "widht=3"]}, "did you mean 'width'"),
        ({"overrides": ["max_text_length=10", "kind=vit"]}, "kind"),
        ({}, "give image_size=… and max_text_length=…"),
        ({"path": "missing.pt"}, "missing.pt: no such file"),
    ],
)
def test_invalid_arguments_are_rejected_with_a_remedy(
    arguments: dict[str, Any], message: str, tmp_path: Path, vocabulary: str
) -> None:
    torch.save(vlmo(), tmp_path / "vlmo.pt")
    values = {"path": f"{tmp_path}/vlmo.pt", "format_name": "vlmo", "out": f"{tmp_path}/out", "vocabulary": vocabulary}
    with pytest.raises((ConfigError, CheckpointError), match=re.escape(message)):
        import_weights(**{**values, **arguments})


def test_both_commands_work_from_the_command_line(tmp_path: Path, vocabulary: str) -> None:
    torch.save(vlmo(), tmp_path / "vlmo.pt")
    out, back = f"{tmp_path}/imported", f"{tmp_path}/b.safetensors"
    options = ["--format", "vlmo", "--vocabulary", vocabulary, "--json"]
    first = CliRunner().invoke(app, ["import", f"{tmp_path}/vlmo.pt", "max_text_length=10", "--out", out, *options])
    assert json.loads(first.stdout)["model"]["width"] == RELATIVE.width
    second = CliRunner().invoke(app, ["export", out, "--format", "vlmo", "--out", back, "--json"])
    assert json.loads(second.stdout)["path"] == back
    assert equal(safetensors.torch.load_file(back), vlmo())
    Path(back).write_bytes(b"other")
    third = CliRunner().invoke(app, ["export", out, "--format", "vlmo", "--out", back])
    assert isinstance(third.exception, ConfigError)
    assert "overwrite another file" in str(third.exception)
    assert Path(back).read_bytes() == b"other"
    assert set(re.findall(r"[a-z]+(?:-hf)?", Format.__metadata__[0].help.partition(":")[2])) >= set(FORMATS)
