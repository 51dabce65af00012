"""Every published format: exact round trips, inferred sizes, faults by name, and the names of the papers' releases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ViLTConfig, VLMoConfig
from pipeline.models import build_model, skeleton
from pipeline.models.checkpoints.formats import FORMATS
from pipeline.models.model import HeadConfig
from tests.support.forwards import MODELS, VOCABULARY

# Format, model, heads, what a round trip leaves out (None: it is not exact), and the keys that tensors do not show.
NO_MIM, REGIONS = ("mim_head.", "image_embedding.mask"), {"region_features": 6, "region_classes": 5}
SHOWN_NOWHERE, ABSENT = {"heads": 3, "longest_side": 48}, ("region_embedding.", "itm_head.", "moc_head.", "mrfr_head.")
CASES: list[tuple[str, str, HeadConfig, tuple[str, ...] | None, dict[str, Any]]] = [
    ("vlmo", "vlmo", HeadConfig("pixels", answers=7), NO_MIM, {"max_text_length": 12}),
    ("vlmo", "vlmo_absolute", HeadConfig(answers=7, nlvr2=True), ("-",), {"heads": 3}),
    ("vilt", "vilt", HeadConfig("pixels", answers=5, nlvr2=True, ranking=True), NO_MIM, SHOWN_NOWHERE),
    ("vilt-hf", "vilt", HeadConfig(answers=5, ranking=True), ("itm_head.",), SHOWN_NOWHERE),
    ("vilt-hf", "vilt", HeadConfig(nlvr2=True), ("itm_head.",), SHOWN_NOWHERE),
    ("vit", "vit", HeadConfig("mean_colour", classes=5), ("mim_head.",), {"heads": 3}),
    ("beit", "vlmo", HeadConfig(), None, {"max_text_length": 12, "vision_language_layers": 2}),
    ("bert", "imagebert", HeadConfig(), ABSENT, {"heads": 3, "max_text_length": 12, **REGIONS}),
]


def weights(model: str, heads: HeadConfig = HeadConfig()) -> dict[str, Tensor]:
    """Return a model's weights, all of them drawn at random."""
    state = build_model(MODELS[model][0], VOCABULARY, heads).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.mark.parametrize(("name", "model", "heads", "left_out", "hidden"), CASES)
def test_round_trips_are_exact_sizes_are_inferred_and_faults_listed_by_name(
    name: str, model: str, heads: HeadConfig, left_out: tuple[str, ...] | None, hidden: dict[str, Any]
) -> None:
    config, format_, state = MODELS[model][0], FORMATS[name], weights(model, heads)
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
    for fault in (f"missing: {missing}\n", "unexpected: other.weight\n", f"{misshaped} (is (3,), must be (24,))"):
        assert fault in str(error.value)
    read = format_.read(published, config, (missing, misshaped[:-6] + "*", "other.*"))
    lacking = {n for n in whole if n not in read}
    assert len(lacking) == 2, "patterns allow these faults, and leave the tensors out"
    assert all(n.endswith("norm.weight") or n.endswith("LayerNorm.weight") for n in lacking)


# ---- VLMo's release

RELATIVE = VLMoConfig(
    width=16, layers=3, heads=2, vision_language_layers=1, image_size=16, patch_size=8, max_text_length=6
)
VLMO = FORMATS["vlmo"]


def test_published_vlmo_has_the_names_and_shapes_of_the_release() -> None:
    state = build_model(RELATIVE, 11, HeadConfig(answers=7, nlvr2=True)).state_dict()
    published = VLMO.write(state, RELATIVE)
    assert {name: tuple(published[name].shape) for name in SHAPES} == SHAPES
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


SHAPES = {
    "relative_position_bias_table": (3**2 + 3 + 2 * 6 + 2, 2 * 3),
    "transformer.patch_embed.proj.weight": (16, 3, 8, 8),
    "token_type_embeddings.weight": (3, 16),
    "vqa_classifier.3.weight": (7, 32),
    "nlvr2_classifier.0.weight": (32, 32),
}


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


# ---- ViLT's release


def test_published_vilt_has_the_names_and_shapes_of_the_release() -> None:
    config, vilt = MODELS["vilt"][0], FORMATS["vilt"]
    state = build_model(config, VOCABULARY, HeadConfig(nlvr2=True)).state_dict()
    for number, name in enumerate(("query", "key", "value")):
        state[f"blocks.1.attention.{name}_bias"].fill_(number)
    published = vilt.write(state, config)
    assert published["transformer.pos_embed"].shape == (1, 17, 24)
    assert published["transformer.cls_token"].shape == (1, 1, 24)
    assert published["transformer.patch_embed.proj.weight"].shape == (24, 3, 8, 8)
    assert published["transformer.blocks.1.attn.qkv.bias"].tolist() == [0] * 24 + [1] * 24 + [2] * 24
    assert published["token_type_embeddings.weight"].shape == (3, 24)
    assert {"mlm_score.bias", "itm_score.fc.weight", "pooler.dense.bias", "nlvr2_classifier.3.weight"} <= set(published)
    assert "mlm_score.decoder.bias" not in published
    published["text_embeddings.position_ids"] = torch.arange(10)[None]
    task = {name: tensor for name, tensor in published.items() if not name.startswith(("mlm", "itm", "nlvr2"))}
    parts = {name.split(".")[0] for name in vilt.read(task, config)}
    assert parts == {"text_embedding", "image_embedding", "blocks", "norm", "pooler"}


def test_imported_vilt_reads_the_releases_longest_side() -> None:
    """int(1333 / 800 * short) in the release and in Hugging Face's processor; the paper's 640 is our default."""
    assert ViLTConfig().longest_side == 640
    for short, longest in ((384, 639), (224, 373), (600, 999)):
        section: Any = MODELS["vilt"][0].model_copy(update={"image_size": short, "longest_side": 1000})
        for name in ("vilt", "vilt-hf"):
            published = FORMATS[name].write(skeleton(section, VOCABULARY).state_dict(), section)
            assert FORMATS[name].infer(published, {"heads": 3})["longest_side"] == longest


# ---- BEiT's release

BEIT_MODULES = {  # its names -> ours
    "attn.proj": "attention.projection",
    "norm1": "norm",
    "norm2": "experts.vision.norm",
    "mlp.fc1": "experts.vision.expand",
    "mlp.fc2": "experts.vision.contract",
}
BEIT_LAYER = {
    "attn.qkv.weight": "attention.weight",
    "attn.q_bias": "attention.query_bias",
    "attn.v_bias": "attention.value_bias",
    "gamma_1": "attention_gamma",
    "gamma_2": "expert_gamma",
} | {f"{theirs}.{last}": f"{name}.{last}" for theirs, name in BEIT_MODULES.items() for last in ("weight", "bias")}
BEIT = {
    "cls_token": "image_embedding.cls",
    "mask_token": "image_embedding.mask",
    "patch_embed.proj.weight": "image_embedding.patch.weight",
    "patch_embed.proj.bias": "image_embedding.patch.bias",
} | {f"blocks.{n}.{theirs}": f"blocks.{n}.{name}" for n in range(4) for theirs, name in BEIT_LAYER.items()}


@pytest.mark.parametrize("is_pretrained", [True, False], ids=["pretrained", "fine-tuned"])
def test_names_of_beits_release_are_read(is_pretrained: bool) -> None:
    config, state = MODELS["vlmo"][0], weights("vlmo", HeadConfig("visual_tokens", 9))
    norm, table = "norm" if is_pretrained else "fc_norm", state["positions.image"]
    names = BEIT | {f"{norm}.weight": "norm.weight", f"{norm}.bias": "norm.bias"}
    released = {theirs: state[name] for theirs, name in names.items()}
    released["patch_embed.proj.weight"] = released["patch_embed.proj.weight"].view(24, 3, 8, 8)
    released |= {name: released[name].view(1, 1, 24) for name in ("cls_token", "mask_token")}
    released["blocks.0.attn.relative_position_index"] = torch.zeros(5, 5)
    if is_pretrained:
        table = table[:, :3].repeat(1, 4)
        released |= {f"lm_head.{last}": state[f"mim_head.predict.{last}"] for last in ("weight", "bias")}
        released["rel_pos_bias.relative_position_bias_table"] = table[:, :3]
    else:
        released |= {"head.weight": torch.zeros(7, 24), "head.bias": torch.zeros(7)}
        for layer, columns in enumerate(table.chunk(4, dim=1)):
            released[f"blocks.{layer}.attn.relative_position_bias_table"] = columns
    read = FORMATS["beit"].read(released, config)
    expected = {name: state[name] for name in names.values()} | {"positions.image": table}
    expected["image_embedding.modality"] = torch.zeros(24)
    if is_pretrained:
        expected |= {f"mim_head.predict.{last}": state[f"mim_head.predict.{last}"] for last in ("weight", "bias")}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
