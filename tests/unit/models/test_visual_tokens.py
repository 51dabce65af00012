"""Visual tokens: the target that a frozen DALL-E encoder gives each patch of an image."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from pipeline.config.errors import CheckpointError, ConfigError
from pipeline.config.load import validate
from pipeline.config.schema import StageConfig
from pipeline.data.storage import Storage
from pipeline.models.visual_tokens import read_tokenizer
from pipeline.objectives.mim import load_image_tokenizer
from tests.support.fuzz import fuzz_rounds, mutate

TOKENS = 29


@pytest.fixture(scope="module")
def theirs() -> FlavaImageCodebook:
    model = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=4, num_blocks_per_group=1, vocab_size=TOKENS))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # small biases, so that many different tokens occur
        torch.nn.init.zeros_(parameter)
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, generator=generator)
    return model.eval()


@pytest.fixture
def files(theirs: FlavaImageCodebook, tmp_path: Path) -> tuple[bytes, bytes, str]:
    """Return config.json, tensors and folder of a saved tokenizer."""
    theirs.save_pretrained(tmp_path)
    return (tmp_path / "config.json").read_bytes(), (tmp_path / "model.safetensors").read_bytes(), str(tmp_path)


def images(side: int) -> Tensor:
    colours = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return colours.repeat_interleave(side // 4, dim=1).repeat_interleave(side // 4, dim=2)


def test_tokens_equal_hugging_face_also_with_names_of_dall_e(theirs: FlavaImageCodebook, files: Any) -> None:
    tokenizer, image, (config, weights, origin) = read_tokenizer(*files), images(32), files
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


def test_images_are_resized_and_tokenised_independently_without_gradient_or_randomness(files: Any) -> None:
    """A 14 x 14 grid of 16-pixel patches is tokenised from 112 pixels, as in BEiT."""
    before, image, small = torch.get_rng_state(), images(32), images(16)
    tokenizer, large = read_tokenizer(*files), small.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert torch.equal(tokenizer(image, 4), torch.cat([tokenizer(image[:1], 4), tokenizer(image[1:], 4)]))
    shapes = [tokenizer(pixels, grid).shape for pixels, grid in ((image[:0], 4), (image[:0], 2), (large, 4))]
    assert shapes == [(0, 16), (0, 4), (3, 16)]
    assert (tokenizer(large, 2) == tokenizer(small, 2)).float().mean() > 0.7  # up to the blur of smoothing


def test_file_that_is_not_a_tokenizer_is_rejected(files: tuple[bytes, bytes, str]) -> None:
    config, weights, origin = files
    wrong: list[tuple[bytes, str]] = [(b'{"model_type": "beit"}', "another model"), (b"{", "cannot be read")]
    for sizes in ({"vocab_size": 10**12}, {"num_blocks_per_group": 10**9}, {"hidden_size": "x"}, {"num_groups": -1}):
        wrong.append((json.dumps(json.loads(config) | sizes).encode(), r"config\.json"))
    deeper = json.dumps(json.loads(config) | {"num_blocks_per_group": 2}).encode()
    for changed, message in [*wrong, (deeper, r"missing: blocks\.group_1")]:
        with pytest.raises(CheckpointError, match=message):
            read_tokenizer(changed, weights, origin)


def test_mutated_tokenizers_raise_only_checkpoint_errors(files: tuple[bytes, bytes, str]) -> None:
    config, weights, origin = files
    rng, escaped = random.Random("tokenizers"), []
    for number in range(fuzz_rounds(30)):
        try:
            damaged = mutate(config, rng) if number % 2 else config
            read_tokenizer(damaged, weights if number % 2 else mutate(weights, rng), origin)
        except CheckpointError:
            pass
        except Exception as error:
            escaped.append(repr(error))
    assert escaped == []


def stage(**keys: object) -> StageConfig:
    values = {"name": "v", "sources": {"a": 1.0}, "objectives": {"mim": {}}, "steps": 1, "global_batch_size": 16} | keys
    config = {"name": "t", "model": {}, "sources": {"a": {"shards": "x", "type": "images"}}, "stages": [values]}
    return validate(config, "test").stages[0]


def test_stage_loads_its_configured_tokenizer(files: tuple[bytes, bytes, str]) -> None:
    def loaded(**tokenizer: Any) -> Any:
        keys = {"image_target": "visual_tokens", "image_tokenizer": tokenizer} if tokenizer else {}
        return load_image_tokenizer(stage(**keys), Storage(), torch.device("cpu"))

    assert loaded() is None
    assert loaded(weights=files[2], tokens=TOKENS).tokens == TOKENS
    with pytest.raises(ConfigError, match=f"tokens is 8192.*{TOKENS}"):
        loaded(weights=files[2])
    with pytest.raises(CheckpointError, match="no image tokenizer"):
        loaded(weights=f"{files[2]}/nowhere")
