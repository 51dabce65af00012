"""The training step on images: masked, partly visible or decoded patches, visual tokens, and classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.errors import ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.batch import Batch
from pipeline.data.storage import Storage
from pipeline.objectives import head_config
from pipeline.objectives.mim import mean_colour_targets
from pipeline.training.collectives import Collectives
from pipeline.training.stages import Stage, build_stage_model, check_stages
from pipeline.training.step import TrainingStep
from tests.support.gradients import PlainEngine

ROWS, SIDE, PATCH = 8, 24, 8
VISUAL_TOKENS = 5
MASKING = {"image_mask_ratio": 0.3, "mask_token_prob": 0.5, "random_patch_prob": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "covered": {"image_target": "mean_colour"},
    "shown in part": {"image_target": "mean_colour", "masking": MASKING},
    "decoded": {"image_target": "pixels", "image_decoder": {"width": 16, "layers": 1, "heads": 2}},
    "named by tokens": {
        "image_target": "visual_tokens",
        "image_tokenizer": {"weights": "nowhere", "tokens": VISUAL_TOKENS},
    },
}


def run_config(kind: str, objective: str = "mim", **stage: Any) -> RunConfig:
    sizes = {"width": 16, "layers": 2, "heads": 2, "image_size": SIDE, "patch_size": PATCH, "drop_path": 0.3}
    more = {"vision_language_layers": 1, "max_text_length": 8} if kind == "vlmo" else {}
    values = {
        "name": "test",
        "model": {"kind": kind, **sizes, **more, "init_std": 0.2},
        "sources": {"a": {"shards": "x", "type": "labelled" if objective == "classification" else "images"}},
        "data": {"streams": 1},
        "stages": [
            {
                "name": "vision",
                "sources": {"a": 1.0},
                "objectives": {objective: {}},
                "steps": 2,
                "global_batch_size": ROWS,
                "max_text_length": 8,
                "num_classes": 3,
                **stage,
            }
        ],
        "engine": {"precision": "float32"},
    }
    return validate(values, "test")


def batch_of(config: RunConfig) -> Batch:
    draw = torch.Generator().manual_seed(3)
    positions = torch.stack([torch.randperm(9, generator=draw)[:3] for _ in range(ROWS)])
    shown = torch.where(torch.arange(3) == 0, -1, torch.randint(0, 9, (ROWS, 3), generator=draw))
    return Batch(
        step=4,
        place=torch.arange(ROWS),
        uid=torch.arange(ROWS),
        image_id=torch.arange(ROWS),
        source=torch.zeros(ROWS, dtype=torch.int64),
        image=torch.randint(0, 256, (ROWS, SIDE, SIDE, 3), generator=draw, dtype=torch.uint8),
        patch_positions=positions,
        patch_replacements=shown if config.stages[0].masking.mask_token_prob < 1 else None,
        label=torch.arange(ROWS) % 3,
    )


def tokens_of(image: Tensor, grid: int) -> Tensor:
    """Return invented visual tokens, a function of each patch's colour."""
    everywhere = torch.arange(grid**2).expand(len(image), -1)
    return mean_colour_targets(image, everywhere, image.shape[1] // grid) % VISUAL_TOKENS


def gradients(config: RunConfig, micro_batch_size: int | None) -> tuple[dict[str, Tensor], float]:
    config = config.model_copy(
        update={"engine": config.engine.model_copy(update={"micro_batch_size": micro_batch_size})}
    )
    engine = PlainEngine(build_stage_model(Stage(config, 0), Storage(), 11), config.stages[0].optimizer)
    step = TrainingStep(engine, Stage(config, 0), Collectives(), tokens_of)
    loss = step(batch_of(config))["loss"]
    scale = step.accumulation
    return {name: gradient / scale for name, gradient in engine.gradients().items()}, float(loss)


CASES = [(kind, "mim", name) for kind in ("vlmo", "vit") for name in VARIANTS]
CASES += [("vit", "classification", ""), ("vlmo", "classification", "")]


@pytest.mark.parametrize(("kind", "objective", "variant"), CASES)
def test_micro_batches_have_the_gradient_of_the_whole_batch(kind: str, objective: str, variant: str) -> None:
    config = run_config(kind, objective, **VARIANTS.get(variant, {}))
    whole, loss = gradients(config, None)
    parts, loss_of_parts = gradients(config, 3)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["vlmo", "vit"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_exactly_the_trained_parameters_get_a_gradient(kind: str, variant: str) -> None:
    config = run_config(kind, **VARIANTS[variant])
    model = build_stage_model(Stage(config, 0), Storage(), 11)
    found, _ = gradients(config, None)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_trap_section_3_labels_differ_from_patch_to_patch() -> None:
    """lucidrains/vit-pytorch#97 trained masked patches against labels that were equal everywhere."""
    batch = batch_of(run_config("vit"))
    whole = mean_colour_targets(batch.image, torch.arange(9).expand(ROWS, -1), PATCH)
    assert len(whole.unique()) > 1
    black_and_white = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    black_and_white[:, :, PATCH:] = 255
    expected = torch.tensor([[0, 511, 511] * 3])
    assert torch.equal(mean_colour_targets(black_and_white, torch.arange(9)[None], PATCH), expected)


def test_encoder_reads_no_patch_that_the_decoder_predicts() -> None:
    config = run_config("vlmo", **VARIANTS["decoded"])
    step = TrainingStep(
        PlainEngine(build_stage_model(Stage(config, 0), Storage(), 11), config.stages[0].optimizer),
        Stage(config, 0),
        Collectives(),
    )
    (one,) = step._forwards(batch_of(config)).values()
    assert one.visible_patches is not None
    assert one.patch_positions is not None
    both = torch.cat([one.visible_patches, one.patch_positions], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(9).expand(ROWS, -1))


def test_heads_of_a_stage_follow_its_image_target() -> None:
    found = head_config(run_config("vit", **VARIANTS["named by tokens"]), 0)
    assert found.image_targets(PATCH) == VISUAL_TOKENS
    assert head_config(run_config("vit", **VARIANTS["decoded"]), 0).image_decoder is not None
    for kind in ("vlmo", "vit"):
        check_stages(run_config(kind, **VARIANTS["decoded"]))


@pytest.mark.parametrize(
    ("kind", "objective", "keys", "fault"),
    [
        ("vit", "mim", {"image_decoder": {}, "masking": MASKING}, "reads no masked patch"),
        ("vilt", "mim", {"image_decoder": {}}, "supported by models of kind vlmo and vit"),
        ("vilt", "mim", {"masking": {"patch_shape": "blocks"}}, "blocks are defined on square images"),
        ("vit", "classification", {"num_classes": None}, "num_classes: required"),
    ],
)
def test_unsupported_stage_is_rejected(kind: str, objective: str, keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        check_stages(run_config(kind, objective, **keys))


def test_invalid_section_is_rejected() -> None:
    with pytest.raises(ConfigError, match="exceeds 1"):
        run_config("vit", masking={"mask_token_prob": 0.8, "random_patch_prob": 0.3})
    with pytest.raises(ConfigError, match="multiple of heads 7"):
        run_config("vit", image_decoder={"heads": 7})


def test_padding_of_shorter_masks_does_not_change_the_loss() -> None:
    """Images that keep their aspect ratio have masks of different lengths, padded with -1."""
    from pipeline.objectives.mim import mim_loss

    prediction, target = torch.randn(2, 3, 7), torch.tensor([[1, 2, 3], [4, 0, 0]])
    is_masked = torch.tensor([[True, True, True], [True, False, False]])
    parts = mim_loss(prediction[:1], target[:1]) + mim_loss(prediction[1:, :1], target[1:, :1])
    torch.testing.assert_close(mim_loss(prediction, target, is_masked), parts)
    pixels = torch.randn(2, 3, 7)
    parts = mim_loss(prediction[:1], pixels[:1]) + mim_loss(prediction[1:, :1], pixels[1:, :1])
    torch.testing.assert_close(mim_loss(prediction, pixels, is_masked), parts)
