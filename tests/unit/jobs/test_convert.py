"""`mome import` and `mome export`: published checkpoints predict like their original code, and unusable ones are named.

The checkpoints are tiny models with random weights: of Hugging Face's own classes (contract C8), and for releases
whose code is not packaged, the tensors of our models, which tests/golden compares with the released code.
"""

import json
import random
import re
import shutil
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

from jobs.cli import Format, app
from jobs.convert import export_weights, import_weights
from jobs.predict import predict
from pipeline.config.errors import CheckpointError, ConfigError, MomeError, StorageError
from pipeline.config.schema import ViLTConfig, VLMoConfig
from pipeline.data.contents.images import decode, resize_for
from pipeline.data.contents.text import Tokenizer, tokens_of
from pipeline.data.storage import Storage
from pipeline.inference import build_trained_model, drop_untrained_objectives, load
from pipeline.models import build_model, skeleton
from pipeline.models.checkpoints.formats import FORMATS
from pipeline.models.forward import ForwardInput
from pipeline.models.model import HeadConfig
from pipeline.objectives import modules_for
from pipeline.training.checkpoint.weights import Weights, load_weights, save_weights
from pipeline.training.stages import load_matching
from tests.support import beit3_reference
from tests.support.forwards import randomised
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.hub import hub

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


same, close = (partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance) for tolerance in (0, 1e-5))


def ranked(probabilities: Tensor, names: list[str]) -> Any:
    return pytest.approx(dict(zip(names, probabilities.tolist(), strict=True)), abs=2e-5)


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
            return {"true": pytest.approx(logits[0].softmax(0)[1].item(), abs=2e-5)}
        if self.kind == "ViltForImageAndTextRetrieval":
            return {"ranking": pytest.approx(logits.item(), abs=2e-4)}
        (place,) = (ids[0] == TOKENS.index("[MASK]")).nonzero().flatten()
        return {"words": [ranked(logits[0, place].softmax(0), TOKENS)]}


PRETRAINED = IMAGES | {"vocab_size": 192, "use_mask_token": True, "use_shared_relative_position_bias": True}
CASES = {
    "BERT": Case("bert", "BertForMaskedLM", SIZES | {"vocab_size": len(TOKENS)}, images=0, text=MASKED),
    "ViT, bare": Case("vit", "ViTModel", IMAGES | {"qkv_bias": False}, text=None),
    "ViT, classes": Case("vit", "ViTForImageClassification", IMAGES | {"id2label": dict(enumerate(LABELS))}, text=None),
    "BEiT": Case("beit", "BeitForMaskedImageModeling", PRETRAINED, text=None),
    "ViLT, masked words": Case("vilt-hf", "ViltForMaskedLM", VILT, text=MASKED),
    "ViLT, VQA": Case("vilt-hf", "ViltForQuestionAnswering", VILT | {"id2label": dict(enumerate(ANSWERS))}),
    "ViLT, NLVR2": Case("vilt-hf", "ViltForImagesAndTextClassification", VILT | TWO, images=2),
    "ViLT, retrieval": Case("vilt-hf", "ViltForImageAndTextRetrieval", VILT | {"qkv_bias": False}),
}
LAYOUTS = [*((name, layout) for layout in ("file", "folder") for name in CASES)]
LAYOUTS += [("BERT", "bin"), ("BERT", "shards"), ("ViLT, VQA", "shards")]  # rarer forms


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder with the vocabulary and a photo."""
    monkeypatch.chdir(tmp_path)
    Path("vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS))
    pixels = np.random.default_rng(3).integers(0, 256, (40, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("one.png")


def publish(name: str, layout: str = "folder") -> tuple[Case, Any, str, Path]:
    """Publish a case; return it, its model, the path to import, and the folder of its files."""
    case, folder = CASES[name], Path(f"published as {CASES[name].format}")
    kind = getattr(transformers, case.kind)
    model = randomised(kind(kind.config_class(**case.sizes)))
    model.save_pretrained(folder, max_shard_size="30KB" if layout == "shards" else "1GB")
    shutil.copy("vocab.txt", folder)
    assert (folder / "model.safetensors.index.json").exists() == (layout == "shards")
    if layout == "bin":
        torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return case, model, str(folder / "model.safetensors") if layout == "file" else str(folder), folder


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@torch.no_grad()
def test_imported_checkpoint_predicts_like_the_original(name: str, layout: str) -> None:
    case, model, path, _ = publish(name, layout)
    import_weights(path, case.format, "imported")
    weights = load_weights(Storage(), "imported")
    section, photo = weights.config.model, decode(Path("one.png").read_bytes(), 10**6)
    pixels = torch.tensor(resize_for(photo, section)) / 127.5 - 1
    tokens = [TOKENS.index(word) for word in (case.text or "").split()]
    expected = case.predictions(model, [pixels.permute(2, 0, 1)[None]] * case.images, torch.tensor([[2, *tokens, 3]]))
    one, two = [*["one.png"] * case.images, None, None][:2]
    if case.format == "beit":
        stage: Any = weights.config.stage_named(weights.stage)
        assert (stage.image_target, stage.image_tokenizer.tokens) == ("visual_tokens", 192)
    if not expected:
        with pytest.raises(ConfigError, match="nothing can be predicted"):
            predict("imported", one, two, case.text)
        return
    first = predict("imported", one, two, case.text, top=100)
    assert {key: first[key] for key in expected} == expected
    # Export and re-import give the same predictions (B6), in both file formats.
    for ending in ("pt", "safetensors") if layout == "file" else ():
        export_weights("imported", case.format, f"again.{ending}")
        import_weights(f"again.{ending}", case.format, ending, vocabulary="vocab.txt")
        again = predict(ending, one, two, case.text, top=100)
        assert all(again[key] == first[key] for key in expected)


def released(section: Any = RELATIVE, answers: int | None = None) -> dict[str, Tensor]:
    model = build_model(section, len(TOKENS), HeadConfig(answers=answers), seed=5)
    return FORMATS[section.kind].write(model.state_dict(), section)


def imported(state: Any, *overrides: str, format_name: str = "vlmo", out: str = "imported", **more: Any) -> Weights:
    """Import a file of these contents and return the weights."""
    torch.save(state, "weights.pt")
    sizes = [*(["max_text_length=10"] if format_name == "vlmo" else ["heads=3"]), *overrides]
    import_weights("weights.pt", format_name, out, sizes, vocabulary="vocab.txt", **more)
    return load_weights(Storage(), out)


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
    section: Any, heads: HeadConfig, lacks: tuple[str, ...], objectives: set[str]
) -> None:
    own = randomised(build_model(section, len(TOKENS), heads)).state_dict()  # type: ignore[arg-type]
    published = FORMATS[section.kind].write(own, section)
    published = {name: tensor for name, tensor in published.items() if not lacks or not name.startswith(lacks)}
    Path("answers.json").write_text(json.dumps(ANSWERS))
    listed = {"answers": "answers.json"} if heads.answers else {}
    sizes = ["heads=3"] if section is ABSOLUTE else []
    weights = imported({"state_dict": published}, *sizes, format_name=section.kind, **listed)
    assert (weights.config.model, weights.absent) == (section, set())
    same(weights.tensors, {name: own[name] for name in weights.tensors})
    assert set(weights.config.stage_named(weights.stage).objectives) == objectives
    # Export and re-import give the same weights (B6), in both file formats, without further arguments.
    for ending in ("pt", "safetensors"):
        assert export_weights("imported", section.kind, f"again.{ending}")["left_out"] == []
        import_weights(f"again.{ending}", section.kind, ending, vocabulary="vocab.txt")
        second = load_weights(Storage(), ending)
        same(second.tensors, weights.tensors)
        assert (second.config.model, second.config.stages) == (section, weights.config.stages)
        assert second.choices == weights.choices
    same(torch.load("again.pt", weights_only=True)["state_dict"], published)


def test_our_own_header_gives_the_sizes_and_is_checked_and_headers_of_others_are_no_model_section() -> None:
    model = build_model(RELATIVE, len(TOKENS), HeadConfig("pixels", answers=5, nlvr2=True), seed=5)
    safetensors.torch.save_file(model.state_dict(), "own.safetensors", {"model": RELATIVE.model_dump_json()})
    import_weights("own.safetensors", "safetensors", "first", vocabulary="vocab.txt")
    export_weights("first", "safetensors", "again.safetensors")
    import_weights("again.safetensors", "safetensors", "second", vocabulary="vocab.txt")
    for name in ("first", "second"):
        weights = load_weights(Storage(), name)
        assert weights.config.model == RELATIVE
        assert (weights.stage, weights.config.stages[-2].num_answers) == ("imported_statements", 5)
        same(build_trained_model(weights).state_dict(), model.state_dict())
    left_out = ["image_embedding.mask", "mim_head.predict.bias", "mim_head.predict.weight"]
    assert export_weights("first", "vlmo", "out.pt")["left_out"] == left_out
    state = released(RELEASED_VILT)
    for number, header in enumerate(("vit-base", "[1]", "{}", '{"name": "x"}')):
        safetensors.torch.save_file(state, "w.safetensors", {"model": header})
        import_weights("w.safetensors", "vilt", f"out{number}", ["heads=3"], vocabulary="vocab.txt")
    claimed = RELEASED_VILT.model_copy(update={"layers": 10**9})
    own = {n: torch.zeros(t.shape) for n, t in skeleton(RELEASED_VILT, len(TOKENS)).state_dict().items()}
    safetensors.torch.save_file(own, "w.safetensors", {"model": claimed.model_dump_json()})
    for format_name in ("safetensors", "vilt"):
        with pytest.raises((CheckpointError, ConfigError), match=r"layers are claimed|no ViLT"):
            import_weights("w.safetensors", format_name, "claimed")


def test_heads_and_experts_that_a_file_lacks_serve_no_objective(caplog: pytest.LogCaptureFixture) -> None:
    stage = {n: t for n, t in released().items() if "_vl" not in n and not n.startswith(("itc", "itm", "logit"))}
    assert imported(stage, "vision_language_layers=1", out="stage").absent == {"vision_language_expert"}
    state = released()
    del state["itc_vl_image_proj.fc.weight"], state["itm_score.fc.bias"]
    with pytest.raises(CheckpointError, match=r"missing: itc_vl_image_proj\.fc\.weight, itm_score\.fc\.bias"):
        imported(state)
    weights = imported(state, may_differ=("itc_vl_*", "itm_*"))
    assert {n for n in weights.tensors if n.startswith("itm_head.")} == {"itm_head.classify.weight"}
    assert set(weights.config.stages[-1].objectives) == {"mlm"}, "an incomplete head serves no objective"
    with pytest.raises(ConfigError, match="nothing can be predicted"):
        predict("imported", "one.png", None, TEXT)
    # Weights of a stage whose head was lost later.
    weights = imported(released(), out="whole")
    tensors = {n: t for n, t in weights.tensors.items() if n != "itc_head.image_vl.weight"}
    metadata = {"config": weights.config.model_dump(mode="json"), "stage": weights.stage, "step": 0}
    save_weights(Storage(), "cut", tensors, TOKENS, metadata)
    usable = drop_untrained_objectives(load_weights(Storage(), "cut"))
    assert set(usable.config.stage_named(usable.stage).objectives) == {"itm", "mlm"}
    assert "no complete head for itc" in caplog.text


def test_model_with_one_itc_head_starts_from_one_with_two() -> None:
    two, one = build_model(RELATIVE, len(TOKENS)), build_model(RETRIEVAL, len(TOKENS))
    load_matching(one, one.resize_state(dict(two.state_dict()), RELATIVE), "retrieval")
    text = ForwardInput(("itc",), text=torch.tensor([[2, 5, 3], [2, 6, 3]]))
    forwards = {"image": ForwardInput(("itc",), image=torch.rand(2, 24, 24, 3)), "text": text}
    results, both = one(forwards), two(forwards)
    for name, outputs in results.items():
        assert outputs.keys() == {"itc", "scale"}
        torch.testing.assert_close(outputs["itc"], both[name]["itc"])
    (results["image"]["itc"].sum() + results["text"]["itc"].sum() + results["image"]["scale"]).backward()
    trained = {one.part_of(n) for n, p in one.named_parameters() if p.grad is not None}
    assert trained == modules_for(one, "itc", "pairs")


@pytest.mark.parametrize("name", ["BERT", "ViT, bare", "ViLT, retrieval"])
def test_assumed_number_of_heads_is_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case, _, path, folder = publish(name, "file")
    (folder / "config.json").unlink()
    for overrides, heads, logged in (([], 1, ["heads=1 assumed (width/64); give heads=N"]), (["heads=3"], 3, [])):
        caplog.clear()
        import_weights(path, case.format, str(heads), overrides, vocabulary="vocab.txt")
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("heads=")]
        assert [line.removesuffix(" if that is wrong") for line in lines] == logged
        assert load_weights(Storage(), str(heads)).config.model.heads == heads


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
def test_unsupported_hugging_face_config_is_rejected(name: str, wrong: dict[str, Any], message: str) -> None:
    case, _, path, folder = publish(name)
    change(folder / "config.json", **wrong)
    with pytest.raises(ConfigError, match=re.escape(message)):
        import_weights(path, case.format, "out")


def test_interpolation_is_read_from_the_processor_config_and_quantised_tensors_are_rejected() -> None:
    _, _, path, folder = publish("ViT, classes")
    for resample, expected in (({"resample": 2}, "bilinear"), ({"resample": 3}, "bicubic"), ({}, "bilinear")):
        values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **resample}
        for file, contents in {"preprocessor_config": values, "processor_config": {"image_processor": values}}.items():
            (folder / f"{file}.json").write_text(json.dumps(contents))
            out = f"{expected}{len(resample)}{file}"
            import_weights(path, "vit", out)
            assert load_weights(Storage(), out).config.model.interpolation == expected
            (folder / f"{file}.json").unlink()
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for kind in (torch.int8, torch.bool, torch.complex64):
        for number in (1, 1000):
            quantised = {name: (10 * tensor).to(kind) for name, tensor in list(state.items())[:number]}
            safetensors.torch.save_file({**state, **quantised}, folder / "model.safetensors")
            with pytest.raises(CheckpointError, match="floating-point"):
                import_weights(path, "vit", "out")
    assert not Path("out").exists()


def test_unusable_tokens_and_labels_are_rejected_or_dropped() -> None:
    case, _, path, folder = publish("BERT")
    (folder / "vocab.txt").unlink()
    wrong_names = [[7], {}, 1.5, True, "7", "\ud83d", "c\nd", None]
    for wrong in wrong_names:
        ids: dict[str, Any] = {token: number for number, token in enumerate(TOKENS[:-1])}
        ids |= {wrong: len(ids)} if wrong in ("\ud83d", "c\nd") else {TOKENS[-1]: wrong}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": ids}}))
        with pytest.raises(MomeError):
            import_weights(path, case.format, "out")
        assert not Path("out").exists(), wrong
    case, _, path, folder = publish("ViT, classes")
    labels = json.loads((folder / "config.json").read_text())["id2label"]
    for number, wrong in enumerate(wrong_names):
        change(folder / "config.json", id2label={**labels, "0": wrong})
        with pytest.raises(MomeError) if wrong == "\ud83d" else nullcontext():  # no UTF-8 text
            import_weights(path, case.format, f"out{number}")
        assert Path(f"out{number}").exists() == (wrong != "\ud83d"), wrong


def test_import_replaces_no_file() -> None:
    case, _, path, folder = publish("BERT")
    for name in ("weights.safetensors", "vocab.txt", "MANIFEST.json", "answers.json", "COMMIT.json"):
        out = Path(name.replace(".", "_"))
        out.mkdir()
        (out / name).write_text("mine")
        for target in (out, folder):  # the folder of the checkpoint itself contains vocab.txt
            with pytest.raises(ConfigError, match=r"--out .*which would be lost"):
                import_weights(path, case.format, str(target))
        assert [file.name for file in out.iterdir()] == [name]
    assert (folder / "vocab.txt").exists()
    imported(released())
    with pytest.raises(ConfigError, match="which would be lost"):
        imported(released())


def test_answers_are_read_in_every_common_format_and_checked() -> None:
    states = {answers: released(RELEASED_VILT, answers) for answers in (5, None)}
    contents: list[Any] = [
        ANSWERS,
        {answer: number for number, answer in enumerate(ANSWERS)},
        {str(number): answer for number, answer in enumerate(ANSWERS)},
        ("\ufeff" + "\r\n".join(ANSWERS) + "\r\n\r\n").encode(),
    ]
    for number, content in enumerate(contents):
        Path("answers").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        weights = imported(states[5], format_name="vilt", answers="answers", out=f"out{number}")
        assert list(weights.choices["answers.json"]) == ANSWERS
    wrong: list[tuple[bytes, int | None, str]] = [
        (json.dumps(ANSWERS[:4]).encode(), 5, "names 4, the head has 5 outputs"),
        (json.dumps([*ANSWERS[:4], "yes"]).encode(), 5, "'yes' is listed more than once"),
        (b'{"yes": 0, "no": 7}', 5, "expected a JSON list"),
        (b"[1, 2", 5, "is no JSON"),
        (b"\xff\xfe", 5, "is no UTF-8"),
        (json.dumps(ANSWERS).encode(), None, "answer no questions"),
    ]
    for invalid, outputs, message in wrong:
        Path("answers").write_bytes(invalid)
        with pytest.raises(ConfigError, match=message):
            imported(states[outputs], format_name="vilt", answers="answers")
    with pytest.raises(ConfigError, match="no such file"):
        imported(states[5], format_name="vilt", answers="missing")


def test_a_repository_of_a_hub_is_imported_like_its_folder_and_refusals_name_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, folder, _ = publish("ViLT, VQA", "shards")
    import_weights(folder, "vilt-hf", "local")
    expected = load_weights(Storage(), "local")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub({"owner/vilt": Path(folder), "owner/gated": Path(folder)}, {"owner/gated": "hf_secret-of-mine"}) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        for name, message in (
            ("owner/none", "no such repository, or it is private.*HF_TOKEN"),
            ("owner/gated", "gated.*set HF_TOKEN"),
        ):
            with pytest.raises(StorageError, match=message):
                import_weights(f"hf://{name}", "vilt-hf", "refused")
        with pytest.raises(CheckpointError, match="no such file, and no folder"):
            import_weights("hf://owner/vilt/below", "vilt-hf", "refused")
        monkeypatch.setenv("HF_TOKEN", "hf_secret-of-mine")
        for name in ("vilt@v1", "gated"):
            import_weights(f"hf://owner/{name}", "vilt-hf", name)
            weights = load_weights(Storage(), name)
            same(weights.tensors, expected.tensors)
            assert weights.vocabulary == expected.vocabulary
            assert weights.choices == expected.choices
        shutil.copytree("local", "uploaded")
        served.repositories["owner/ours"] = Path("uploaded")
        answers = [predict(url, "one.png", None, "a b")["answers"] for url in ("hf://owner/ours", "local")]
        assert answers[0] == answers[1]
    assert any("/resolve/v1/" in request for request in served.requests)
    assert not Path("refused").exists()


def test_a_folder_is_read_from_any_storage_and_its_index_is_checked(tmp_path: Path) -> None:
    _, _, path, folder = publish("BERT", "shards")
    storage, url = Storage(), f"memory://hub/copy-{tmp_path.name}"
    for file in folder.iterdir():
        storage.write(f"{url}/{file.name}", file.read_bytes())
    import_weights(f"{url}/", "bert", "out")
    assert load_weights(storage, "out").config.model.heads == 3
    index = folder / "model.safetensors.index.json"
    files, other = json.loads(index.read_text())["weight_map"], "files of the same folder"
    wrong = {"missing.safetensors": "missing", "../../weights.pt": other, "/etc/passwd": other, 7: other, "..": other}
    for file_name, message in wrong.items():
        change(index, weight_map={**files, "bert.embeddings.LayerNorm.bias": file_name})
        with pytest.raises(CheckpointError, match=message):
            import_weights(path, "bert", "other")
    for content in (b"", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}'):
        index.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            import_weights(path, "bert", "other")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.format != "beit"])
@torch.no_grad()
def test_exported_folder_is_read_by_transformers_with_the_same_weights_config_and_vocabulary(name: str) -> None:
    case, model, path, _ = publish(name)
    import_weights(path, case.format, "imported")
    export_weights("imported", case.format, "exported")
    kind = getattr(transformers, json.loads(Path("exported/config.json").read_text())["architectures"][0])
    reread, info = kind.from_pretrained("exported", output_loading_info=True)
    assert isinstance(model, kind)
    assert all("pooler" in key for key in info["missing_keys"]), "only what our models lack is drawn at random"
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    lost = ("pooler", ".bias", "bert.embeddings.position_embeddings")  # absent, tied, or cut to the texts of ImageBERT
    states = [{n: t for n, t in m.state_dict().items() if not any(part in n for part in lost)} for m in (reread, model)]
    same(*states)
    expected = {key: value for key, value in case.sizes.items() if key not in ("qkv_bias", "id2label")}
    assert {key: getattr(reread.config, key) for key in expected} == expected
    if case.text is not None:
        tokens = transformers.AutoTokenizer.from_pretrained("exported")
        assert tokens("a b c")["input_ids"] == [2, 5, 6, 7, 3]
    import_weights("exported", case.format, "again")
    same(load_weights(Storage(), "again").tensors, load_weights(Storage(), "imported").tensors)
    if "id2label" in case.sizes and case.images < 2:
        assert load_weights(Storage(), "again").choices == load_weights(Storage(), "imported").choices
    Path("exported/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"would overwrite another file.*config\.json"):
        export_weights("imported", case.format, "exported")


@torch.no_grad()
def test_clip_is_imported_used_and_exported_with_its_tokens_and_image_processing() -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    vision = {"hidden_size": 16, "intermediate_size": 64, "image_size": 24, "patch_size": 8, **sizes}
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "' s</w>"]
    tokens = tokens_of("\n".join(["#version: 0.2", *merges]).encode())
    text = {
        "hidden_size": 12,
        "intermediate_size": 48,
        "vocab_size": len(tokens),
        "max_position_embeddings": 9,
        **sizes,
    }
    text |= {"eos_token_id": len(tokens) - 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=10)
    model, folder = randomised(transformers.CLIPModel(config)), Path("published")
    model.save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split()) for m in merges])
    tokenizer.save_pretrained(folder)
    side = {"height": 24, "width": 24}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=side)
    processor.save_pretrained(folder)
    import_weights(str(folder), "hf-clip", "imported")
    words, photo = ["a cat's dog", "DOG", "cat " * 20], Image.open("one.png")
    encoded = tokenizer(words, padding=True, truncation=True, max_length=9, return_tensors="pt")
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    expected = model(input_ids=encoded["input_ids"], pixel_values=pixels)
    for name in ("imported", "again"):
        loaded = load(name)
        close(loaded.encode_image(["one.png"]), expected.image_embeds)
        close(loaded.encode_text(words), expected.text_embeds)
        export_weights(name, "hf-clip", "exported")  # the second time the same files
        if name == "imported":
            import_weights("exported", "hf-clip", "again")
    reread = transformers.CLIPModel.from_pretrained("exported")
    same(reread.state_dict(), model.state_dict())
    close(reread(input_ids=encoded["input_ids"], pixel_values=pixels).image_embeds, expected.image_embeds)
    again = transformers.AutoTokenizer.from_pretrained("exported")
    assert again(words, truncation=True)["input_ids"] == tokenizer(words, truncation=True, max_length=9)["input_ids"]
    same(CLIPImageProcessorPil.from_pretrained("exported")(photo, return_tensors="pt")["pixel_values"], pixels)
    export_weights("imported", "open-clip", "clip.pt")
    Path("tokens.txt").write_text("\n".join(tokens))
    known = ["heads=2", "text_heads=2", "activation=quick_gelu", "image_size=24"]
    import_weights("clip.pt", "open-clip", "from open_clip", known, vocabulary="tokens.txt")
    same(load_weights(Storage(), "from open_clip").tensors, load_weights(Storage(), "imported").tensors)
    with pytest.raises(ConfigError, match=r"Hugging Face folder.*give a file's name"):
        export_weights("imported", "open-clip", "folder")


@pytest.mark.parametrize("name", ["BERT", "ViLT, VQA", "BEiT"])
def test_mutated_folders_raise_only_mome_errors(name: str) -> None:
    """Mutate every file that the import reads. A mutation that only changes a number may be imported."""
    case, _, path, folder = publish(name, "shards")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    rng = random.Random(f"folders {name}")
    for number in range(fuzz_rounds(25)):
        target = rng.choice(sorted(whole))
        (folder / target).write_bytes(mutate(whole[target], rng))
        with suppress(MomeError):
            import_weights(path, case.format, f"out-{number}")
        (folder / target).write_bytes(whole[target])


def test_both_commands_work_and_reject_invalid_arguments_with_a_remedy() -> None:
    torch.save(released(), "vlmo.pt")
    size, back = "max_text_length=10", "b.safetensors"
    invalid: dict[str, dict[str, Any]] = {
        "--format onnx: unknown; known: vlmo": {"format_name": "onnx"},
        "--vocabulary": {"overrides": [size], "vocabulary": None},
        "did you mean 'width'": {"overrides": [size, "widht=3"]},
        "kind": {"overrides": [size, "kind=vit"]},
        "give image_size=… and max_text_length=…": {},
        "missing.pt: no such file": {"path": "missing.pt"},
    }
    for message, arguments in invalid.items():
        values = {"path": "vlmo.pt", "format_name": "vlmo", "out": "out", "vocabulary": "vocab.txt", **arguments}
        with pytest.raises((ConfigError, CheckpointError), match=re.escape(message)):
            import_weights(**values)
    options = ["--out", "imported", "--format", "vlmo", "--vocabulary", "vocab.txt", "--json"]
    first = CliRunner().invoke(app, ["import", "vlmo.pt", size, *options])
    assert json.loads(first.stdout)["model"]["width"] == RELATIVE.width
    export = ["export", "imported", "--format", "vlmo", "--out", back]
    second = CliRunner().invoke(app, [*export, "--json"])
    assert json.loads(second.stdout)["path"] == back
    same(safetensors.torch.load_file(back), released())
    Path(back).write_bytes(b"other")
    third = CliRunner().invoke(app, export)
    assert isinstance(third.exception, ConfigError)
    assert "overwrite another file" in str(third.exception)
    assert Path(back).read_bytes() == b"other"
    assert set(re.findall(r"[a-z0-9]+(?:-(?:hf|clip))?", Format.__metadata__[0].help.partition(":")[2])) >= set(FORMATS)


def test_beit_3s_table_of_words_is_longer_than_its_unigram_vocabulary() -> None:
    published = beit3_reference.random_state(width=16, layers=2, grid=2, patch=8, words=12)
    torch.save({"model": {name: tensor.detach() for name, tensor in published.items()}}, "beit3.pth")
    lines = ["<s>\t0", "<pad>\t0", "</s>\t0", "<unk>\t0", "\u2581a\t-1.5", "\u2581dog\t-2", "s\t-3", "<mask>\t0"]
    Path("pieces.txt").write_text("\n".join(lines))
    sizes = ["heads=2", "max_text_length=9"]
    description = import_weights("beit3.pth", "beit3", "imported", sizes, vocabulary="pieces.txt")
    assert (description["objectives"], description["model"]["attention"]) == (["itc"], "routed")
    weights = load_weights(Storage(), "imported")
    tokenizer = Tokenizer(weights.vocabulary)
    assert (tokenizer.size, tokenizer.tokens[8], tokenizer.mask_id) == (12, "<unused0>", 7)
    assert tokenizer.encode("a dogs", 9).ids == [0, 4, 5, 6, 2]
    with pytest.raises(ConfigError, match="no such form"):
        export_weights("imported", "beit3", "folder")
    Path("pieces.txt").write_text("\n".join([*lines, *(f"{letter}\t-4" for letter in "bcdef")]))
    with pytest.raises(ConfigError, match="has 13 tokens, the weights have 12"):
        import_weights("beit3.pth", "beit3", "other", sizes, vocabulary="pieces.txt")
