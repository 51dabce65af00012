"""Masked-image modelling: masked, replaced and visible patches, MAE's decoder of patches, and visual tokens."""

import json
import random
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.schema import ImageDecoderConfig, ViTConfig, VLMoConfig
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.models.forward import ForwardInput, drop_masked_patches
from pipeline.models.model import HeadConfig, ImageDecoder
from pipeline.models.visual_tokens import read_tokenizer
from pipeline.objectives.mim import load_image_tokenizer, patchify, unpatchify
from tests.support.forwards import run
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.trial import tiny_run

SIZES: dict[str, Any] = {"width": 24, "layers": 3, "heads": 2, "image_size": 24, "patch_size": 8, "init_std": 0.2}
VIT = ViTConfig(**SIZES, drop_path=0.2)
RELATIVE = VLMoConfig(**SIZES, vision_language_layers=1, max_text_length=8)
ABSOLUTE = RELATIVE.model_copy(update={"positions": "absolute"})
ROWS, PATCHES, TOKENS = 3, 9, 29  # those of a frozen DALL-E encoder, which gives each patch its target
POSITIONS = torch.tensor([[0, 4], [2, 8], [3, 5]])
DECODER = ImageDecoderConfig(width=16, layers=2, heads=2)
IMAGES = torch.randint(0, 256, (ROWS, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def vit() -> Any:
    return build_model(VIT, 0, HeadConfig("mean_colour", classes=5), seed=1)


@pytest.fixture(params=[RELATIVE, ABSOLUTE], ids=["relative", "absolute"])
def vlmo(request: pytest.FixtureRequest) -> Any:
    model: Any = build_model(request.param, 11, HeadConfig("pixels", image_decoder=DECODER))
    if model.positions is not None:
        for parameter in model.positions.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(2))
    return model


def test_replaced_patches_equal_an_image_with_swapped_patches_also_when_packed(vit: Any) -> None:
    positions, shown = torch.tensor([[[0, 4, 6], [1, 2, 8], [3, 5, 7]], [[7, -1, 6], [-1, 2, 0], [3, -1, 1]]])
    one = ForwardInput(("mim",), image=IMAGES, patch_positions=positions, patch_replacements=shown)
    patches = patchify(IMAGES, 8).clone()
    patches[0, 0], patches[1, 8], patches[2, 7] = patches[0, 7].clone(), patches[1, 0].clone(), patches[2, 1].clone()
    plain = ForwardInput(("tokens",), image=unpatchify(patches, 8), patch_positions=torch.tensor([[4], [1], [5]]))
    expected = run(vit, plain, "tokens").gather(1, (positions + 1)[..., None].expand(-1, -1, 24))
    torch.testing.assert_close(run(vit, one, "mim"), vit.mim_head(expected))
    unmasked, untouched = replace(one, patch_replacements=positions), ForwardInput(("tokens",), image=IMAGES)
    torch.testing.assert_close(run(vit, unmasked, "tokens"), run(vit, untouched, "tokens"))
    whole = ForwardInput(("mim",), image=IMAGES, patch_positions=POSITIONS)
    partly = replace(whole, patch_replacements=torch.tensor([[3, -1], [2, -1], [-1, -1]]))
    first, second = (output["mim"] for output in vit({"one": whole, "two": partly}).values())
    torch.testing.assert_close([first, second], [run(vit, whole, "mim"), run(vit, partly, "mim")])
    assert not torch.equal(first, second)


def test_order_and_padding_of_visible_patches_do_not_matter(vit: Any, vlmo: Any) -> None:
    order = torch.stack([torch.randperm(PATCHES) for _ in range(ROWS)])
    text, keep = torch.randint(0, 11, (ROWS, 4)), torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    one = ForwardInput(("tokens",), image=IMAGES)
    for model, whole, before in ((vit, one, 1), (vlmo, one, 1), (vlmo, replace(one, text=text, text_keep=keep), 5)):
        places = F.pad(order + before, (before, 0))
        places[:, :before] = torch.arange(before)
        expected = run(model, whole, "tokens")[torch.arange(ROWS)[:, None], places]
        read = run(model, replace(whole, visible_patches=order), "tokens")
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
    few, padded = torch.tensor([[3, 5]] * ROWS), torch.tensor([[3, 5, -1, -1]] * ROWS)
    outputs = [run(vit, replace(one, visible_patches=visible), "classes") for visible in (few, padded)]
    torch.testing.assert_close(outputs[0], outputs[1])
    # Heads at selected positions equal the full forward.
    chosen = replace(one, heads=("itc", "tokens"), visible_patches=torch.tensor([[0, 4], [8, 2], [3, 5]]))
    torch.testing.assert_close(run(vlmo, chosen, "itc"), run(vlmo, chosen)["itc"], rtol=1e-5, atol=1e-5)


def test_decoder_reads_the_ascending_complement_of_the_masked_patches(vlmo: Any) -> None:
    one = ForwardInput(("mim",), image=IMAGES, patch_positions=torch.tensor([[7, 2, 0], [8, 3, 4], [0, 1, 2]]))
    for rows in (slice(3), slice(0)):
        visible: Any = drop_masked_patches(replace(one, patch_positions=one.patch_positions[rows]), 9).visible_patches
        assert visible.tolist() == [[1, 3, 4, 5, 6, 8], [0, 1, 2, 5, 6, 7], [3, 4, 5, 6, 7, 8]][rows]
    one, patches = replace(one, patch_positions=POSITIONS), patchify(IMAGES, 8).clone()
    for row, positions in enumerate(POSITIONS.tolist()):
        patches[row, positions] = 0
    painted = replace(one, image=unpatchify(patches, 8))
    outputs, others = (run(vlmo, drop_masked_patches(each, PATCHES))["mim"] for each in (one, painted))
    assert outputs.shape == (ROWS, 2, 192)
    torch.testing.assert_close(outputs, others)
    with pytest.raises(ValueError, match="image target"):
        run(vlmo, one)


def test_decoder_predicts_each_patch_by_its_position_has_sine_positions_and_ignores_padding() -> None:
    model = build_model(VIT, 0, HeadConfig("pixels", image_decoder=DECODER), seed=1)
    one = drop_masked_patches(ForwardInput(("mim",), image=IMAGES, patch_positions=POSITIONS), PATCHES)
    predictions = run(model, one)["mim"]
    backwards = replace(one, patch_positions=POSITIONS.flip(1))
    torch.testing.assert_close(run(model, backwards)["mim"], predictions.flip(1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictions[:, 0], predictions[:, 1], atol=1e-3)
    assert "image_embedding.mask" not in model.state_dict()
    decoder = ImageDecoder(24, 3, 5, ImageDecoderConfig(width=8, layers=2, heads=2))
    waves = [[np.sin(place), np.sin(place / 100), np.cos(place), np.cos(place / 100)] for place in range(3)]
    expected = np.array([[0.0] * 8, *([*waves[column], *waves[row]] for row in range(3) for column in range(3))])
    np.testing.assert_allclose(decoder.positions.numpy(), expected, atol=1e-6)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features, visible, masked = torch.randn(2, 4, 24), torch.tensor([[0, 4, 2], [8, 1, 3]]), torch.tensor([[7], [5]])
    padded, longer = torch.cat([features, torch.randn(2, 2, 24)], dim=1), F.pad(visible, (0, 2), value=-1)
    torch.testing.assert_close(decoder(padded, longer, masked), decoder(features, visible, masked))


@pytest.fixture
def theirs() -> FlavaImageCodebook:
    model = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=4, num_blocks_per_group=1, vocab_size=TOKENS))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # biases of zero, so that many different tokens occur
        torch.nn.init.zeros_(parameter)
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, generator=generator)
    return model.eval()


@pytest.fixture
def files(theirs: FlavaImageCodebook, tmp_path: Path) -> tuple[bytes, bytes, str]:
    """Return config.json, tensors and folder of a saved tokenizer."""
    theirs.save_pretrained(tmp_path)
    return (tmp_path / "config.json").read_bytes(), (tmp_path / "model.safetensors").read_bytes(), str(tmp_path)


def test_tokens_equal_hugging_face_and_depend_on_no_name_other_image_or_random_number(theirs: Any, files: Any) -> None:
    colours = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    small, image = (colours.repeat_interleave(n, dim=1).repeat_interleave(n, dim=2) for n in (4, 8))
    before, tokenizer, (config, weights, origin) = torch.get_rng_state(), read_tokenizer(*files), files
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    mapped = (image.permute(0, 3, 1, 2) / 255) * 0.8 + 0.1  # DALL-E's pixel transform
    tokens = tokenizer(image, 4)
    assert torch.equal(tokens, theirs.get_codebook_indices(mapped).flatten(1))
    assert (tokens.shape, tokens.dtype, tokenizer.tokens) == ((3, 16), torch.int64, TOKENS)
    assert len(tokens.unique()) > 2
    published = {
        re.sub(r"\.weight$", ".w", re.sub(r"\.bias$", ".b", name)).replace(".group.", ".").replace(".path.", "."): t
        for name, t in load(weights).items()
    }
    assert "blocks.group_1.block_1.res_path.conv_1.w" in published
    assert torch.equal(read_tokenizer(config, save(published), origin)(image, 4), tokens)
    # Images are tokenised independently, and resized to the grid: 224 pixels to 112 for 14 x 14 patches in BEiT.
    assert torch.equal(tokens, torch.cat([tokenizer(image[:1], 4), tokenizer(image[1:], 4)]))
    assert [tokenizer(image[:0], grid).shape for grid in (4, 2)] == [(0, 16), (0, 4)]
    assert (tokenizer(image, 2) == tokenizer(small, 2)).float().mean() > 0.7  # up to the blur of smoothing


def test_files_that_are_no_tokenizer_and_mutated_ones_raise_checkpoint_errors(files: tuple[bytes, bytes, str]) -> None:
    config, weights, origin = files
    wrong: list[tuple[bytes, str]] = [(b'{"model_type": "beit"}', "another model"), (b"{", "cannot be read")]
    for sizes in ({"vocab_size": 10**12}, {"num_blocks_per_group": 10**9}, {"hidden_size": "x"}, {"num_groups": -1}):
        wrong.append((json.dumps(json.loads(config) | sizes).encode(), r"config\.json"))
    deeper = json.dumps(json.loads(config) | {"num_blocks_per_group": 2}).encode()
    for changed, message in [*wrong, (deeper, r"missing: blocks\.group_1")]:
        with pytest.raises(CheckpointError, match=message):
            read_tokenizer(changed, weights, origin)
    rng = random.Random("tokenizers")
    for number in range(fuzz_rounds(30)):
        damaged = (mutate(config, rng), weights) if number % 2 else (config, mutate(weights, rng))
        with suppress(CheckpointError):
            read_tokenizer(*damaged, origin)


def test_stage_loads_its_configured_tokenizer(files: tuple[bytes, bytes, str]) -> None:
    def loaded(**tokenizer: Any) -> Any:
        keys = {"image_target": "visual_tokens", "image_tokenizer": tokenizer} if tokenizer else {}
        stage = tiny_run("vit", "images", {"mim": {}}, **keys).stages[0]
        return load_image_tokenizer(stage, Storage(), torch.device("cpu"))

    assert loaded() is None
    assert loaded(weights=files[2], tokens=TOKENS).tokens == TOKENS
    with pytest.raises(ConfigError, match=f"tokens is 8192.*{TOKENS}"):
        loaded(weights=files[2])
    with pytest.raises(CheckpointError, match="no image tokenizer"):
        loaded(weights=f"{files[2]}/nowhere")
