"""A tiny run on drawn scenes, a tiny model with random weights, and its evaluation."""

from __future__ import annotations

import pytest

from pipeline.config.schema import RunConfig
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import EvalPairs, load_pairs
from pipeline.evaluation.evaluate import Evaluation, evaluate
from pipeline.models import build_model
from pipeline.models.model import HeadConfig
from pipeline.models.vlmo import VLMo
from tests.support.finished_run import SECTION

PAIRS = 24


@pytest.fixture(scope="session")
def storage() -> Storage:
    return Storage()


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, storage: Storage) -> RunConfig:
    """Draw the shards of one synthetic source (24 scenes, two captions each) and return a run of three stages on it."""
    shards = str(tmp_path_factory.mktemp("scenes") / "shards")
    plain = {"steps": 4, "global_batch_size": 8}
    both = {"itc": {}, "itm": {}, "mlm": {}}
    values = {
        "name": "tiny",
        "model": {**SECTION, "max_text_length": 40},
        "sources": {
            "unseen": {"shards": shards, "synthetic": {"scenes": PAIRS, "image_size": 40, "captions": 2}},
            "images": {"shards": shards, "type": "images"},
            "sentences": {"shards": shards, "type": "text"},
        },
        "data": {"streams": 4},
        "stages": (
            {"name": "vision", "sources": {"images": 1.0}, "objectives": {"mim": {}}, **plain},
            {"name": "language", "sources": {"sentences": 1.0}, "objectives": {"mlm": {}}, **plain},
            {"name": "vision_language", "sources": {"unseen": 1.0}, "objectives": both, **plain},
        ),
        "engine": {"precision": "float32"},
        "evaluation": {"source": "unseen", "batch_size": 7},
    }
    run = RunConfig.model_validate(values)
    build_synthetic(storage, {"unseen": run.sources["unseen"]})
    return run


@pytest.fixture(scope="session")
def tokenizer(config: RunConfig, storage: Storage) -> Tokenizer:
    return Tokenizer.train(iter_captions(storage, config.sources["unseen"].shards), 200)


@pytest.fixture(scope="session")
def held_out(config: RunConfig, storage: Storage, tokenizer: Tokenizer) -> EvalPairs:
    return load_pairs(config, storage, "unseen", None, tokenizer, max_text_length=40)


@pytest.fixture(scope="session")
def model(config: RunConfig, tokenizer: Tokenizer) -> VLMo:
    return build_model(config.model, tokenizer.size, HeadConfig("pixels"), seed=3)


@pytest.fixture(scope="session")
def evaluation(model: VLMo, config: RunConfig, storage: Storage, tokenizer: Tokenizer) -> Evaluation:
    """Return the evaluation of the last stage; the earlier stages have the same weights."""
    return evaluate(model, tokenizer, config, storage, others={"vision": model, "language": model})
