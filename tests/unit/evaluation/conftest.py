"""A tiny run on drawn scenes, a tiny model with random weights, and its evaluation."""

import pytest

from pipeline.config.schema import RunConfig
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import load_pairs
from pipeline.evaluation.evaluate import evaluate
from pipeline.models import build_model
from pipeline.models.model import HeadConfig
from tests.support.finished_run import SECTION


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """Draw the shards of one synthetic source (24 scenes, two captions each) and return a run of three stages on it."""
    shards, plain = str(tmp_path_factory.mktemp("scenes") / "shards"), {"steps": 4, "global_batch_size": 8}
    learned = {"vision": ("images", {"mim": {}}), "language": ("sentences", {"mlm": {}})}
    learned["vision_language"] = ("unseen", {"itc": {}, "itm": {}, "mlm": {}})
    run = RunConfig.model_validate({
        "name": "tiny", "model": {**SECTION, "max_text_length": 40},
        "sources": {
            "unseen": {"shards": shards, "synthetic": {"scenes": 24, "image_size": 40, "captions": 2}},
            "images": {"shards": shards, "type": "images"},
            "sentences": {"shards": shards, "type": "text"},
        },
        "stages": tuple(
            {"name": name, "sources": {source: 1.0}, "objectives": objectives, **plain}
            for name, (source, objectives) in learned.items()
        ),
        "data": {"streams": 4}, "engine": {"precision": "float32"},
        "evaluation": {"source": "unseen", "batch_size": 7},
    })  # fmt: skip
    build_synthetic(Storage(), {"unseen": run.sources["unseen"]})
    return run


@pytest.fixture(scope="session")
def tokenizer(config):
    return Tokenizer.train(iter_captions(Storage(), config.sources["unseen"].shards), 200)


@pytest.fixture(scope="session")
def held_out(config, tokenizer):
    return load_pairs(config, Storage(), "unseen", None, tokenizer, max_text_length=40)


@pytest.fixture(scope="session")
def model(config, tokenizer):
    return build_model(config.model, tokenizer.size, HeadConfig("pixels"), seed=3)


@pytest.fixture(scope="session")
def evaluation(model, config, tokenizer):
    """Return the evaluation of the last stage; the earlier stages have the same weights."""
    return evaluate(model, tokenizer, config, Storage(), others={"vision": model, "language": model})
