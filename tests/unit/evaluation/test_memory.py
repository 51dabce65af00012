"""The memory of an evaluation is bounded: COCO's 5,000 images and 25,000 captions within 4 GiB."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.config.schema import RunConfig, SourceConfig
from pipeline.data.building.importers import write_shards
from pipeline.data.contents.text import Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation import datasets as module
from pipeline.evaluation.datasets import EvalPairs, load_pairs
from pipeline.evaluation.evaluate import evaluate
from pipeline.models.forward import ForwardInput, ForwardOutput
from tests.support.ranks import run_ranks

PICTURES, CAPTIONS, SIDE, WIDTH = 5_000, 5, 384, 512
GIB = 2**30


def test_bounded_image_cache_returns_the_same_images(
    config: RunConfig, storage: Storage, tokenizer: Tokenizer, held_out: EvalPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = 3 * 32 * 32
    monkeypatch.setattr(module, "DECODED_BYTES", 5 * one)
    few = load_pairs(config, storage, "unseen", None, tokenizer, max_text_length=40)
    for numbers in (slice(None), slice(3, 9), torch.tensor([20, 2, 2, 7])):
        assert torch.equal(few.images[numbers], held_out.images[numbers])
    assert torch.equal(few.image(11), held_out.image(11))
    assert few.images._decoded.size <= 5 * one  # type: ignore[attr-defined]


class Drawn(nn.Module):
    """Model that gives vectors of its width at no cost: an image's from its colours, a text's from its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.colours = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
        self.words = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(1))

    def forward(self, passes: dict[str, ForwardInput]) -> ForwardOutput:
        (one,) = passes.values()
        if one.image is not None:
            assert one.image.shape[1:] == (SIDE, SIDE, 3)
            return {"only": {"itc": F.normalize(one.image[:, 100, 100].float() @ self.colours, dim=1)}}
        assert one.text is not None
        return {"only": {"itc": F.normalize(self.words[one.text % 1000].sum(dim=1), dim=1)}}


def samples() -> Iterator[dict[str, Any]]:
    for number in range(PICTURES):
        colour = np.array([number % 251, number * 7 % 241, number * 13 % 239], dtype=np.uint8)
        picture = np.broadcast_to(colour, (SIDE, SIDE, 3))
        captions = [f"picture {number} told in words {each} times" for each in range(CAPTIONS)]
        yield {
            "__key__": f"{number:06d}",
            "jpg": simplejpeg.encode_jpeg(np.ascontiguousarray(picture)),
            "json": json.dumps({"captions": captions, "image_id": number}).encode(),
        }


def evaluated(config: RunConfig) -> dict[str, Any]:
    tokenizer = Tokenizer.train(["picture told in words times 0123456789"] * 5, 200)
    found = evaluate(Drawn(), tokenizer, config, Storage())
    return found.to_json() | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


@pytest.mark.slow
def test_5000_images_and_25000_captions_take_less_than_4_gib(config: RunConfig, tmp_path: Path) -> None:
    """Measured in a separate process. The images alone would take 2.1 GiB, and each copy of the scores 0.5 GiB."""
    write_shards(Storage(), samples(), str(tmp_path), 1000)
    stage = config.stages[-1].model_copy(update={"objectives": {"itc": config.stages[-1].objectives["itc"]}})
    config = config.model_copy(
        update={
            "sources": {"coco": SourceConfig(shards=str(tmp_path))},
            "stages": (stage.model_copy(update={"sources": {"coco": 1.0}}),),
            "model": config.model.model_copy(update={"image_size": SIDE}),
            "evaluation": config.evaluation.model_copy(update={"source": "coco", "batch_size": 64}),
        }
    )
    (found,) = run_ranks(evaluated, 1, config)
    assert (found["pairs"], found["captions"]) == (PICTURES, PICTURES * CAPTIONS)
    print(f"peak {found['peak'] / GIB:.2f} GiB")
    assert found["peak"] < 4 * GIB
