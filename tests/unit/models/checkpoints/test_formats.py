"""Every published format: exact round trips, inferred sizes, faults by name, and the names of the papers' releases.

Models with Hugging Face's random weights equal Hugging Face's models (C8), and export the weights back.
"""

import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import (
    DualEncoderConfig,
    ImageBERTConfig,
    TransformerConfig,
    ViLTConfig,
    ViTConfig,
    VLMoConfig,
)
from pipeline.models import build_model, skeleton
from pipeline.models.checkpoints.formats import FORMATS, LAYER_TABLE
from pipeline.models.forward import ForwardInput, Head
from pipeline.models.model import HeadConfig
from pipeline.objectives import modules_for
from tests.support import beit3_reference
from tests.support import forwards as tiny

VOCABULARY, LENGTH, PATCH, TOKENS = 29, 7, 8, 20
EPSILON = 1e-3  # of norms: large enough that another value changes the results
SIZES = torch.tensor([[32, 48], [48, 32], [32, 32], [8, 48], [40, 16]])  # rows and columns of pixels of ViLT's images
ROWS, close = len(SIZES), partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
THEIRS: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
THEIRS |= {"image_size": 32, "patch_size": PATCH, "layer_norm_eps": EPSILON}
OURS: dict[str, Any] = {"width": 24, "layers": 3, "heads": 3, "mlp_ratio": 2, "norm_eps": EPSILON}
IMAGE: dict[str, Any] = OURS | {"image_size": 32, "patch_size": PATCH}
TEXT = {"max_text_length": 10}
BEIT = VLMoConfig(**IMAGE, **TEXT, vision_language_layers=1)
SECTIONS: dict[str, TransformerConfig] = {
    "vit": ViTConfig(**IMAGE),
    "beit": BEIT,
    "beit absolute": BEIT.model_copy(update={"positions": "absolute", "layer_scale": 0.1}),
    "bert": ImageBERTConfig(**OURS, **TEXT, region_features=8, region_classes=7, dropout=0.0),
    "vilt-hf": ViLTConfig(**IMAGE, **TEXT, longest_side=48, text_norm_eps=EPSILON, max_visible_patches=None),
}
HIDDEN = {  # what tensors do not show
    "vit": ("heads",),
    "beit": ("max_text_length", "vision_language_layers"),
    "beit absolute": ("heads", "max_text_length", "vision_language_layers"),
    "bert": ("heads", "region_features", "region_classes"),
    "vilt-hf": ("heads", "longest_side"),
}
MASKED = torch.tensor([[0, 3, 4, 8], [1, 2, 5, 6], [0, 1, 7, 8], [9, 10, 11, 15], [0, 2, 4, 6]])
COVERED = torch.zeros(ROWS, 16, dtype=torch.bool).scatter(1, MASKED, True)
KEEP = torch.arange(LENGTH) < torch.tensor([7, 5, 6, 3, 4])[:, None]
EVERYWHERE = torch.arange(LENGTH).expand(ROWS, LENGTH)
SECOND = torch.arange(ROWS).roll(1)  # the other image of NLVR2's statements


@dataclass(frozen=True)
class Case:
    """A class of transformers, and the head of ours that computes the same."""

    section: str
    kind: str
    head: Head
    config: dict[str, Any]
    heads: HeadConfig = field(default_factory=HeadConfig)
    has_equal_gradients: bool = True  # by the name of each parameter

    @property
    def format(self) -> str:
        return self.section.split()[0]

    def model(self) -> Any:
        words = TOKENS if self.format in ("vit", "beit") else VOCABULARY
        sizes, kind = {"vocab_size": words, "max_position_embeddings": 10}, getattr(transformers, self.kind)
        return tiny.randomised(kind(kind.config_class(**THEIRS | sizes | self.config)))


SHARED, EACH = {"use_shared_relative_position_bias": True}, {"use_relative_position_bias": True}
TWO = {"num_images": 2, "num_labels": 2, "modality_type_vocab_size": 3}
VISUAL = HeadConfig("visual_tokens", TOKENS)
MIM = SHARED | {"use_mask_token": True, "drop_path_rate": 0.0}
PRETRAINED = Case("beit", "BeitForMaskedImageModeling", "mim", MIM, VISUAL, has_equal_gradients=False)
CASES = [
    Case("vit", "ViTForImageClassification", "classes", {"num_labels": 5}, HeadConfig(classes=5)),
    Case("vit", "ViTModel", "tokens", {"qkv_bias": False}, has_equal_gradients=False),
    PRETRAINED,
    Case("beit", "BeitForImageClassification", "tokens", EACH | {"drop_path_rate": 0.0}),
    Case("beit", "BeitModel", "tokens", EACH | {"use_mean_pooling": False, "drop_path_rate": 0.0}),
    Case("beit", "BeitModel", "tokens", SHARED | {"use_mean_pooling": False}, has_equal_gradients=False),
    Case("beit absolute", "BeitModel", "tokens", {"use_absolute_position_embeddings": True, "use_mean_pooling": False}),
    Case("bert", "BertModel", "tokens", {}),
    Case("bert", "BertForMaskedLM", "mlm", {}),
    Case("bert", "BertForPreTraining", "mlm", {}),
    Case("vilt-hf", "ViltModel", "tokens", {}),  # which pads short images with shuffled patches, in random order
    Case("vilt-hf", "ViltForMaskedLM", "mlm", {}),
    Case("vilt-hf", "ViltForImageAndTextRetrieval", "ranking", {}, HeadConfig(ranking=True)),
    Case("vilt-hf", "ViltForQuestionAnswering", "answers", {"num_labels": 5}, HeadConfig(answers=5)),
    Case("vilt-hf", "ViltForImagesAndTextClassification", "nlvr2", TWO, HeadConfig(nlvr2=True)),
]


def inputs(format_name: str) -> dict[str, Tensor]:
    """Return inputs under Hugging Face's names: images, texts, or both."""
    generator = torch.Generator().manual_seed(1)
    words = {"input_ids": torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)}
    words["attention_mask"] = KEEP.long()
    if format_name == "bert":
        return words
    side = 48 if format_name == "vilt-hf" else 32
    image = torch.rand(ROWS, 3, side, side, generator=generator) * 2 - 1
    if format_name != "vilt-hf":
        return {"pixel_values": image}
    mask = (torch.arange(48)[:, None] < SIZES[:, 0, None, None]) & (torch.arange(48) < SIZES[:, 1, None, None])
    return words | {"pixel_values": image * mask[:, None], "pixel_mask": mask.long()}


def ours(case: Case, given: dict[str, Tensor]) -> ForwardInput:
    members: dict[str, Any] = {"mask_positions": EVERYWHERE} if case.head == "mlm" else {}
    if "input_ids" in given:
        members |= {"text": given["input_ids"], "text_keep": KEEP}
    if "pixel_values" in given:
        members["image"] = given["pixel_values"].permute(0, 2, 3, 1)
        members |= {"image_size": SIZES} if "pixel_mask" in given else {}
    if case.head == "nlvr2":
        members |= {"second_image": members["image"][SECOND], "second_image_size": SIZES[SECOND]}
    return ForwardInput((case.head,), **members, patch_positions=MASKED if case.head == "mim" else None)


def expected(case: Case, model: Any, given: dict[str, Tensor]) -> Tensor:
    """Return the output of Hugging Face's model that our head has."""
    if case.head == "nlvr2":
        given = given | {n: torch.stack([given[n], given[n][SECOND]], 1) for n in ("pixel_values", "pixel_mask")}
    if case.head == "mim":
        return model(**given, bool_masked_pos=COVERED).logits.gather(1, MASKED[..., None].expand(-1, -1, TOKENS))
    if case.kind == "BeitForImageClassification":  # whose only trained norm is the pooler's
        return model.beit.pooler.layernorm(model.beit(**given).last_hidden_state)
    key = "last_hidden_state" if case.head == "tokens" else "logits"
    output = model(**given)["prediction_logits" if case.kind == "BertForPreTraining" else key]
    return output.squeeze(1) if case.head == "ranking" else output


DROPPED = {
    "vit": r"^vit\.pooler\.",
    "beit": r"^classifier\.|^beit\.pooler\.dense",
    "bert": r"^bert\.pooler\.|^cls\.seq_relationship\.|^cls\.predictions\.decoder\.bias$",
    "vilt-hf": r"(?!)",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind} {'_'.join(case.config)[:20]}")
def test_outputs_gradients_sizes_and_written_weights_equal_hugging_face(case: Case, tmp_path: Path) -> None:
    theirs, section, format_ = case.model(), SECTIONS[case.section], FORMATS[case.format]
    model, published = build_model(section, VOCABULARY, case.heads), tiny.saved(theirs, tmp_path)
    missing, unexpected = model.load_state_dict(state := format_.read(published, section), strict=False)
    assert not unexpected
    hidden = {key: getattr(section, key) for key in HIDDEN[case.section]}
    inferred = type(section).model_validate(format_.infer(published, hidden))
    assert inferred.architecture() == section.architecture()
    if case.kind.endswith("Model"):
        published = {f"{'vilt' if case.format == 'vilt-hf' else case.format}.{n}": t for n, t in published.items()}
    if case.kind == "BeitForImageClassification":
        published = {name.replace("beit.pooler.layernorm", "beit.layernorm"): t for name, t in published.items()}
    written = format_.write(state, section)  # what is tied in the files is written twice
    written = {n: t for n, t in written.items() if n != "cls.predictions.decoder.bias" and "decoder.weight" not in n}
    if case.config.get("qkv_bias") is False:  # zeros are written
        written = {name: t for name, t in written.items() if name in published or t.any()}
    assert written.keys() == {name for name in published if not re.search(DROPPED[case.format], name)}
    assert all(torch.equal(published[name], tensor) for name, tensor in written.items())
    absent = {model.part_of(name) for name in missing}
    if case.format == "beit":
        assert not absent & set(modules_for(model, "mim", "images") or ()), "the image forward is imported as a whole"
    else:
        assert absent <= set(model.HEAD_PARTS)
    given = inputs(case.format)
    output, reference = model({"one": ours(case, given)})["one"][case.head], expected(case, theirs, given)
    if "input_ids" in given and case.head in ("tokens", "mlm"):  # the words, and ViLT's [CLS] of the image
        kept = F.pad(KEEP, (0, 1), value=True)
        output, reference = (x[:, : LENGTH + 1][kept[:, : x.shape[1]]] for x in (output, reference))
    close(output, reference)
    if not case.has_equal_gradients:
        return
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    for outputs in (output, reference):
        (outputs * weights).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    theirs.load_state_dict(gradients, strict=False)
    # BEiT has no modality vector; the gradients of tied matrices are summed there.
    tied = r"\.word(_embeddings)?\.weight$|^mlm_head\.decode\.weight$"
    for name, gradient in format_.read(tiny.saved(theirs, tmp_path), section).items():
        own = model.get_parameter(name).grad
        if own is not None and not re.search(tied if case.head == "mlm" else r"embedding\.modality$", name):
            torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-5)


def clip_case(activation: str) -> tuple[Any, DualEncoderConfig]:
    """Return a CLIPModel with random weights, and the section of ours that computes the same."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48, "layer_norm_eps": EPSILON}
    vision = {"hidden_size": 24, "image_size": 32, "patch_size": PATCH, "hidden_act": activation, **sizes}
    text = {"hidden_size": 12, "max_position_embeddings": 10, "vocab_size": VOCABULARY, "hidden_act": activation}
    text |= {**sizes, "num_hidden_layers": 2, "intermediate_size": 24, "eos_token_id": VOCABULARY - 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    section = FORMATS["hf-clip"].section(json.loads(config.to_json_string(use_diff=False)), {})
    model = tiny.randomised(transformers.CLIPModel(config))
    model.logit_scale.data.fill_(2.0)  # below the bound that ours clamps it to
    return model, DualEncoderConfig(**FORMATS["hf-clip"].infer(model.state_dict(), section))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_clips_features_logits_and_gradients_equal_hugging_faces(activation: str) -> None:
    theirs, section = clip_case(activation)
    sizes = {"width": 24, "layers": 3, "heads": 3, "mlp_ratio": 2, "image_size": 32, "patch_size": PATCH}
    sizes |= {"text_width": 12, "text_layers": 2, "text_heads": 3, "embedding": 16, "max_text_length": 10}
    assert section == DualEncoderConfig(**sizes, norm_eps=EPSILON, activation=activation)
    ours = build_model(section, VOCABULARY)
    ours.load_state_dict(FORMATS["hf-clip"].read(theirs.state_dict(), section))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (ROWS, 32, 32, 3), generator=generator).to(torch.uint8)
    text = torch.randint(0, VOCABULARY - 1, (ROWS, LENGTH), generator=generator)
    text = text.where(torch.arange(LENGTH) < KEEP.sum(dim=1, keepdim=True) - 1, VOCABULARY - 1)  # and padding
    normalised = (pixels / 255 - torch.tensor(section.image_mean)) / torch.tensor(section.image_std)
    expected = theirs(input_ids=text, pixel_values=normalised.permute(0, 3, 1, 2))
    inputs = {"image": ForwardInput(("itc",), pixels), "text": ForwardInput(("itc",), text=text, text_keep=KEEP)}
    outputs = ours(inputs)
    image, words = outputs["image"]["itc"], outputs["text"]["itc"]
    logits = outputs["image"]["scale"] * image @ words.T
    for own, other in (
        (image, expected.image_embeds),
        (words, expected.text_embeds),
        (logits, expected.logits_per_image),
    ):
        close(own, other)
    for values in (logits, expected.logits_per_image):
        (F.cross_entropy(values, torch.arange(ROWS)) + F.cross_entropy(values.T, torch.arange(ROWS))).backward()
    gradients = FORMATS["hf-clip"].write({name: p.grad for name, p in ours.named_parameters()}, section)
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        close(gradients[name], parameter.grad)


def test_beit_3s_features_contrast_and_gradients_equal_a_reference_and_round_trip() -> None:
    state = beit3_reference.random_state(width=24, layers=3, grid=4, patch=PATCH, words=VOCABULARY)
    format_ = FORMATS["beit3"]
    section = VLMoConfig(**format_.infer(state, {"heads": 3, "max_text_length": 10}))
    sizes = {"width": 24, "layers": 3, "heads": 3, "mlp_ratio": 2, "image_size": 32, "patch_size": PATCH}
    assert all(getattr(section, key) == size for key, size in sizes.items())
    model = build_model(section, VOCABULARY)
    more = {"mlm_head.weight": torch.zeros(VOCABULARY, 24), "mim_head.bias": torch.zeros(8192)}  # of pretraining
    missing, unexpected = model.load_state_dict(format_.read(state | more, section), strict=False)
    assert not unexpected
    assert {model.part_of(name) for name in missing} == {"pooler", "itm_head", "mlm_head"}
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(ROWS, 32, 32, 3, generator=generator) * 2 - 1
    text = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    words: dict[str, Any] = {"text": text, "text_keep": KEEP}
    outputs = model({
        "image": ForwardInput(("tokens", "itc"), image), "text": ForwardInput(("tokens", "itc"), **words),
        "fused": ForwardInput(("tokens",), image, **words),
    })  # fmt: skip
    pixels = image.permute(0, 3, 1, 2)
    references = {
        "image": beit3_reference.features(state, 3, pixels, None, None),
        "text": beit3_reference.features(state, 3, None, text, KEEP),
        "fused": beit3_reference.features(state, 3, pixels, text, KEEP),
    }
    pairs: list[tuple[Tensor, Tensor]] = [(outputs["image"]["tokens"], references["image"])]
    pairs.append((outputs["text"]["tokens"][KEEP], references["text"][KEEP]))
    fused, reference = outputs["fused"]["tokens"], references["fused"]  # text first, and image first
    pairs += [(fused[:, LENGTH:], reference[:, :17]), (fused[:, :LENGTH][KEEP], reference[:, 17:][KEEP])]
    for name, head in (("image", "vision_head"), ("text", "language_head")):
        projected = F.normalize(references[name][:, 0] @ state[f"{head}.weight"].T, dim=-1)
        pairs.append((outputs[name]["itc"], projected))
    pairs.append((outputs["image"]["scale"], state["logit_scale"].exp()))
    for own, other in pairs:
        close(own, other)
    for values in zip(*pairs, strict=True):  # of ours, and of the reference
        torch.stack([(x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in values]).sum().backward()
    gradients = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in state.items()}
    for name, gradient in format_.read(gradients, section).items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)
    written, rows = format_.write(format_.read(state, section), section), {"A": slice(2, None), "B": slice(2, 12)}
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in state.items()}
    for name, tensor in written.items():  # but for what is never read
        used = next((kept for letter, kept in rows.items() if f"positions.{letter}" in name), slice(None))
        assert "mask_token" in name or torch.equal(torch.atleast_1d(tensor)[used], torch.atleast_1d(state[name])[used])
    normless = {name: t for name, t in state.items() if "encoder.layer_norm" not in name}
    with pytest.raises(CheckpointError, match="no final norm"):
        format_.read(normless, section)


def test_open_clips_names_and_orientation_hold_the_same_clip() -> None:
    theirs, section = clip_case("quick_gelu")
    state = FORMATS["hf-clip"].read(theirs.state_dict(), section)
    published = FORMATS["open-clip"].write(state, section)
    assert {name: tuple(tensor.shape) for name, tensor in published.items() if ".resblocks." not in name} == {
        "visual.conv1.weight": (24, 3, 8, 8), "visual.class_embedding": (24,), "visual.positional_embedding": (17, 24),
        "visual.ln_pre.weight": (24,), "visual.ln_pre.bias": (24,), "visual.ln_post.weight": (24,),
        "visual.ln_post.bias": (24,), "visual.proj": (24, 16), "token_embedding.weight": (VOCABULARY, 12),
        "positional_embedding": (10, 12), "ln_final.weight": (12,), "ln_final.bias": (12,),
        "text_projection": (12, 16), "logit_scale": (),
    }  # fmt: skip
    assert {name.split(".", 4)[4] for name in published if name.startswith("visual.transformer.resblocks.2.")} == {
        "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias", "ln_1.weight",
        "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
        "mlp.c_proj.bias",
    }  # fmt: skip
    attention = theirs.text_model.encoder.layers[1].self_attn
    biases = torch.cat([attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias])
    assert torch.equal(published["transformer.resblocks.1.attn.in_proj_bias"], biases)
    assert torch.equal(published["visual.proj"], theirs.visual_projection.weight.T)
    of_openai = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(10)}  # are no weights
    known = {"heads": 3, "text_heads": 3, "activation": "quick_gelu", "norm_eps": EPSILON}
    assert DualEncoderConfig(**FORMATS["open-clip"].infer(published | of_openai, known)) == section
    reread = FORMATS["open-clip"].read(published | of_openai, section)
    assert reread.keys() == state.keys()
    assert all(torch.equal(reread[name], tensor) for name, tensor in state.items())
    shown = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    config = {"model_cfg": {"vision_cfg": {"width": 1024}, "text_cfg": {"heads": 12}}, "preprocess_cfg": shown}
    stated = FORMATS["open-clip"].section(config, {})
    assert (stated["heads"], stated["text_heads"], stated["activation"]) == (16, 12, "gelu")
    assert stated["image_mean"] == [0.1, 0.2, 0.3]
    with pytest.raises(ConfigError, match="timm_model_name"):
        FORMATS["open-clip"].section({"model_cfg": {"vision_cfg": {"timm_model_name": "convnext"}}}, {})


def test_patches_equal_those_of_hugging_faces_vilt_which_are_in_random_order() -> None:
    case, section, given = Case("vilt-hf", "ViltModel", "tokens", {}), SECTIONS["vilt-hf"], inputs("vilt-hf")
    theirs, model = case.model(), build_model(section, VOCABULARY)
    model.load_state_dict(FORMATS["vilt-hf"].read(theirs.state_dict(), section), strict=False)
    tokens = model({"one": ours(case, given)})["one"]["tokens"][:, LENGTH + 1 :]
    for row, (height, width) in enumerate(SIZES.tolist()):  # one image at a time has no padding
        one = {name: tensor[row : row + 1] for name, tensor in given.items()}
        one["pixel_values"] = one["pixel_values"][:, :, :height, :width]
        one["pixel_mask"] = one["pixel_mask"][:, :height, :width]
        hidden, patches = theirs(**one).last_hidden_state[0, LENGTH + 1 :], tokens[row, : height * width // PATCH**2]
        order = torch.cdist(hidden, patches).argmin(dim=0)
        assert len(order.unique()) == len(patches)
        close(patches, hidden[order])


def test_hugging_face_loads_our_beit_with_equal_outputs(tmp_path: Path) -> None:
    """Our modality vector is folded into the tensors that it is added to, and the tables are one for each layer."""
    model, given = tiny.randomised(build_model(BEIT, VOCABULARY, VISUAL)), inputs("beit")  # type: ignore[arg-type]
    config = transformers.BeitConfig(**THEIRS, **EACH, use_mask_token=True, vocab_size=TOKENS)
    config.save_pretrained(tmp_path)
    save_file(FORMATS["beit"].write(model.state_dict(), BEIT), tmp_path / "model.safetensors", {"format": "pt"})
    theirs, info = transformers.BeitForMaskedImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert [*info["missing_keys"], *info["unexpected_keys"]] == []
    close(model({"one": ours(PRETRAINED, given)})["one"]["mim"], expected(PRETRAINED, theirs.eval(), given))


def test_trap_section_3_layer_scale_and_shared_tables_come_from_beit(tmp_path: Path) -> None:
    """VLMo's release fails at `int("relative_position_bias_table")`; its 0.1 is only for random initialisation."""
    config = transformers.BeitConfig(**THEIRS, **SHARED, layer_scale_init_value=1e-5)
    published = tiny.saved(transformers.BeitModel(config), tmp_path)
    state = FORMATS["beit"].read(published, BEIT)
    gammas = torch.stack([tensor for name, tensor in state.items() if name.endswith("gamma")])
    assert torch.equal(gammas, torch.full((6, 24), 1e-5))
    table = next(name for name in published if name.endswith("bias_table"))
    wrong = published | {table: torch.zeros(5, 3)}
    with pytest.raises(CheckpointError, match=rf"{re.escape(table)} \(is \(5, 3\), must be \(52, 3\)\)"):
        FORMATS["beit"].read(wrong, BEIT)
    assert "positions.image" not in FORMATS["beit"].read(wrong, BEIT, allowed=[f"beit.{table}"])
    # Hugging Face's BEiT adds a shared table to those of the layers, if it has both.
    both = published | {LAYER_TABLE.format(0).removeprefix("beit."): published[table]}
    with pytest.raises(CheckpointError, match=r"layer\.0\..*relative_position_bias_table"):
        FORMATS["beit"].read(both, BEIT)


def test_tied_decoders_are_copied_old_names_read_positions_cut_and_no_name_is_shared_by_two_heads() -> None:
    bert, vilt = ("BertForMaskedLM", "cls.predictions.decoder.weight"), ("ViltForMaskedLM", "mlm_score.decoder.weight")
    for section, (kind, decoder) in {"bert": bert, "vilt-hf": vilt}.items():
        state = Case(section, kind, "mlm", {}).model().state_dict()
        del state[decoder]
        read = FORMATS[section].read(state, SECTIONS[section])
        words = next(tensor for name, tensor in read.items() if re.search(r"^text_embedding\.word.*weight$", name))
        copied = read["mlm_head.decode.weight"]
        assert torch.equal(words, copied)
        assert words.data_ptr() != copied.data_ptr()
    both = build_model(SECTIONS["vilt-hf"], 5, HeadConfig(answers=5, nlvr2=True)).state_dict()
    with pytest.raises(CheckpointError, match="one classifier"):
        FORMATS["vilt-hf"].write(both, SECTIONS["vilt-hf"])
    read, state = FORMATS["bert"].read, Case("bert", "BertModel", "tokens", {}).model().state_dict()
    section = SECTIONS["bert"]
    old = {re.sub(r"Norm\.weight$", "Norm.gamma", re.sub(r"Norm\.bias$", "Norm.beta", n)): t for n, t in state.items()}
    assert read(state, section).keys() == read(old, section).keys()
    shorter = read(state, section.model_copy(update={"max_text_length": 7}))
    positions = state["embeddings.position_embeddings.weight"]
    assert torch.equal(shorter["text_embedding.position_embeddings.weight"], positions[:7])
    with pytest.raises(ConfigError, match=r"model\.max_text_length"):
        read(state, section.model_copy(update={"max_text_length": 13}))


# Format, model, heads, what a round trip leaves out (None: it is not exact), and the keys that tensors do not show.
NO_MIM, REGIONS = ("mim_head.", "image_embedding.mask"), {"region_features": 6, "region_classes": 5}
SHOWN_NOWHERE, ABSENT = {"heads": 3, "longest_side": 48}, ("region_embedding.", "itm_head.", "moc_head.", "mrfr_head.")
NO_POOLED = ("pooler.", "itm_head.", "mlm_head.")  # BEiT-3's heads of that kind compute otherwise
ROUND_TRIPS: list[tuple[str, str, HeadConfig, tuple[str, ...] | None, dict[str, Any]]] = [
    ("vlmo", "vlmo", HeadConfig("pixels", answers=7), NO_MIM, {"max_text_length": 12}),
    ("vlmo", "vlmo_absolute", HeadConfig(answers=7, nlvr2=True), ("-",), {"heads": 3}),
    ("vilt", "vilt", HeadConfig("pixels", answers=5, nlvr2=True, ranking=True), NO_MIM, SHOWN_NOWHERE),
    ("vilt-hf", "vilt", HeadConfig(answers=5, ranking=True), ("itm_head.",), SHOWN_NOWHERE),
    ("vilt-hf", "vilt", HeadConfig(nlvr2=True), ("itm_head.",), SHOWN_NOWHERE),
    ("vit", "vit", HeadConfig("mean_colour", classes=5), ("mim_head.",), {"heads": 3}),
    ("beit", "vlmo", HeadConfig(), None, {"max_text_length": 12, "vision_language_layers": 2}),
    ("beit3", "vlmo_routed", HeadConfig(), NO_POOLED, {"heads": 3, "max_text_length": 12}),
    ("bert", "imagebert", HeadConfig(), ABSENT, {"heads": 3, "max_text_length": 12, **REGIONS}),
]


def weights(model: str, heads: HeadConfig = HeadConfig()) -> dict[str, Tensor]:
    """Return a model's weights, all of them drawn at random."""
    state = build_model(tiny.MODELS[model][0], tiny.VOCABULARY, heads).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.mark.parametrize(("name", "model", "heads", "left_out", "hidden"), ROUND_TRIPS)
def test_round_trips_are_exact_sizes_are_inferred_and_faults_listed_by_name(
    name: str, model: str, heads: HeadConfig, left_out: tuple[str, ...] | None, hidden: dict[str, Any]
) -> None:
    config, format_, state = tiny.MODELS[model][0], FORMATS[name], weights(model, heads)
    published = format_.write(state, config)
    whole = format_.read(published, config, ())
    if left_out is not None:
        assert list(whole) == [name for name in state if not name.startswith(left_out)]
        assert all(torch.equal(whole[name], state[name]) for name in whole)
    section = format_.infer(published, hidden)
    assert type(config).model_validate(section).architecture() == config.architecture()
    with pytest.raises(ConfigError, match="checkpoint"):
        format_.infer({"weight": torch.zeros(2)}, {})
    missing, misshaped = sorted(n for n in published if "norm" in n.lower() and n.endswith("weight"))[:2]
    del published[missing]
    published |= {misshaped: torch.zeros(3), "other.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        format_.read(published, config, ())
    faults = (f"missing: {missing}\n", "unexpected: other.weight\n", f"{misshaped} (is (3,), must be (24,))")
    assert all(fault in str(error.value) for fault in faults)
    lacking = whole.keys() - format_.read(published, config, (missing, misshaped[:-6] + "*", "other.*")).keys()
    assert len(lacking) == 2, "patterns allow these faults, and leave the tensors out"
    assert all(re.search(r"norm(\.vision|\.language)?\.weight$", name.lower()) for name in lacking)


_SIZES: dict[str, Any] = {"width": 16, "layers": 3, "heads": 2, "image_size": 16, "patch_size": 8}
RELATIVE, VLMO = VLMoConfig(**_SIZES, vision_language_layers=1, max_text_length=6), FORMATS["vlmo"]


def test_published_vlmo_has_the_names_and_shapes_of_the_release() -> None:
    state = build_model(RELATIVE, 11, HeadConfig(answers=7, nlvr2=True)).state_dict()
    published = VLMO.write(state, RELATIVE)
    assert published["relative_position_bias_table"].shape == (3**2 + 3 + 2 * 6 + 2, 2 * 3)
    assert published["transformer.patch_embed.proj.weight"].shape == (16, 3, 8, 8)
    assert published["token_type_embeddings.weight"].shape == (3, 16)
    assert published["vqa_classifier.3.weight"].shape == (7, 32)
    assert published["nlvr2_classifier.0.weight"].shape == (32, 32)
    assert {f"nlvr2_classifier.{n}.bias" for n in (0, 1, 3)} <= set(published)
    assert {"transformer.blocks.2.norm2_vl.weight", "transformer.blocks.0.gamma_1", "mlm_score.bias"} <= set(published)
    assert "transformer.blocks.1.mlp_vl.fc1.weight" not in published
    assert torch.equal(published["token_type_embeddings.weight"][2], state["image_embedding.second"])
    # Indices and unused positions are dropped; a stage may lack whole modules, and the classifier its modality.
    more = {"relative_position_index": torch.zeros(5, 5), "text_embeddings.position_embeddings.weight": torch.zeros(4)}
    assert VLMO.read(published | more, RELATIVE).keys() == state.keys()
    stage = {n: t for n, t in published.items() if "_vl" not in n and not n.startswith(("itc", "itm", "logit"))}
    assert not any("vision_language" in name or "itc" in name for name in VLMO.read(stage, RELATIVE))
    kept = {name: tensor for name, tensor in published.items() if "nlvr2" not in name}
    assert VLMO.write(VLMO.read(kept, RELATIVE), RELATIVE).keys() == kept.keys()
    del published["relative_position_bias_table"]
    back = VLMO.read(published, RELATIVE, ["relative_position_bias_table"])
    assert state.keys() - back.keys() == {"positions.image", "positions.cross", "positions.text"}


def test_vlmos_sizes_are_inferred_unless_its_table_is_ambiguous() -> None:
    for image_size, rows in ((224, 1126), (384, 2606), (480, 3878)):
        config = VLMoConfig(width=24, layers=2, heads=2, vision_language_layers=1, image_size=image_size)
        published = VLMO.write(skeleton(config, 11).state_dict(), config)
        assert len(published["relative_position_bias_table"]) == rows
        assert VLMO.infer(published, {})["image_size"] == image_size
    published = VLMO.write(skeleton(RELATIVE, 11).state_dict(), RELATIVE)
    with pytest.raises(ConfigError, match="give image_size=… and max_text_length=…"):
        VLMO.infer(published, {})
    published["text_relative_position_index"] = torch.zeros(6, 6)
    assert VLMoConfig(**VLMO.infer(published, {})).architecture() == RELATIVE.architecture()


def test_published_vilt_has_the_names_and_shapes_of_the_release_and_its_longest_side() -> None:
    """It is int(1333 / 800 * short) there and in Hugging Face's processor; the paper's 640 is our default."""
    config, vilt = tiny.MODELS["vilt"][0], FORMATS["vilt"]
    state = build_model(config, tiny.VOCABULARY, HeadConfig(nlvr2=True)).state_dict()
    for number, name in enumerate(("query", "key", "value")):
        state[f"blocks.1.attention.{name}_bias"].fill_(number)
    published = vilt.write(state, config)
    shapes = [published[f"transformer.{n}"].shape for n in ("pos_embed", "cls_token", "patch_embed.proj.weight")]
    assert shapes == [(1, 17, 24), (1, 1, 24), (24, 3, 8, 8)]
    assert published["transformer.blocks.1.attn.qkv.bias"].tolist() == [0] * 24 + [1] * 24 + [2] * 24
    assert published["token_type_embeddings.weight"].shape == (3, 24)
    assert {"mlm_score.bias", "itm_score.fc.weight", "pooler.dense.bias", "nlvr2_classifier.3.weight"} <= set(published)
    assert "mlm_score.decoder.bias" not in published
    published["text_embeddings.position_ids"] = torch.arange(10)[None]
    task = {name: tensor for name, tensor in published.items() if not name.startswith(("mlm", "itm", "nlvr2"))}
    parts = {name.split(".")[0] for name in vilt.read(task, config)}
    assert parts == {"text_embedding", "image_embedding", "blocks", "norm", "pooler"}
    assert ViLTConfig().longest_side == 640
    for short, longest in ((384, 639), (224, 373), (600, 999)):
        section: Any = tiny.MODELS["vilt"][0].model_copy(update={"image_size": short, "longest_side": 1000})
        for name in ("vilt", "vilt-hf"):
            published = FORMATS[name].write(skeleton(section, tiny.VOCABULARY).state_dict(), section)
            assert FORMATS[name].infer(published, {"heads": 3})["longest_side"] == longest


# BEiT's release: its names -> ours.
BEIT_MODULES = {"attn.proj": "attention.projection", "norm1": "norm", "norm2": "experts.vision.norm"}
BEIT_MODULES |= {"mlp.fc1": "experts.vision.expand", "mlp.fc2": "experts.vision.contract"}
BEIT_LAYER = {f"{theirs}.{x}": f"{name}.{x}" for theirs, name in BEIT_MODULES.items() for x in ("weight", "bias")}
BEIT_LAYER |= {"attn.qkv.weight": "attention.weight", "gamma_1": "attention_gamma", "gamma_2": "expert_gamma"}
BEIT_LAYER |= {"attn.q_bias": "attention.query_bias", "attn.v_bias": "attention.value_bias"}
RELEASED_BEIT = {f"blocks.{n}.{theirs}": f"blocks.{n}.{name}" for n in range(4) for theirs, name in BEIT_LAYER.items()}
RELEASED_BEIT |= {f"patch_embed.proj.{last}": f"image_embedding.patch.{last}" for last in ("weight", "bias")}
RELEASED_BEIT |= {"cls_token": "image_embedding.cls", "mask_token": "image_embedding.mask"}


@pytest.mark.parametrize("is_pretrained", [True, False], ids=["pretrained", "fine-tuned"])
def test_names_of_beits_release_are_read(is_pretrained: bool) -> None:
    config, state = tiny.MODELS["vlmo"][0], weights("vlmo", HeadConfig("visual_tokens", 9))
    norm, table = "norm" if is_pretrained else "fc_norm", state["positions.image"]
    names = RELEASED_BEIT | {f"{norm}.weight": "norm.weight", f"{norm}.bias": "norm.bias"}
    released = {theirs: state[name] for theirs, name in names.items()}
    released["patch_embed.proj.weight"] = released["patch_embed.proj.weight"].view(24, 3, 8, 8)
    released |= {name: released[name].view(1, 1, 24) for name in ("cls_token", "mask_token")}
    released["blocks.0.attn.relative_position_index"], head = torch.zeros(5, 5), dict[str, Tensor]()
    if is_pretrained:
        table, head = table[:, :3].repeat(1, 4), {n: t for n, t in state.items() if n.startswith("mim_head.")}
        released |= {name.replace("mim_head.predict", "lm_head"): tensor for name, tensor in head.items()}
        released["rel_pos_bias.relative_position_bias_table"] = table[:, :3]
    else:
        released |= {"head.weight": torch.zeros(7, 24), "head.bias": torch.zeros(7)}
        for layer, columns in enumerate(table.chunk(4, dim=1)):
            released[f"blocks.{layer}.attn.relative_position_bias_table"] = columns
    read = FORMATS["beit"].read(released, config)
    expected = {name: state[name] for name in names.values()} | {"positions.image": table} | head
    expected["image_embedding.modality"] = torch.zeros(24)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
