"""A registered model, loaded from MLflow in a fresh process, gives the outputs of its checkpoint."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from jobs.convert import import_weights
from jobs.tracking import register_checkpoint
from pipeline.config.errors import ConfigError, TrackingError
from pipeline.config.schema import VLMoConfig
from pipeline.data.contents.images import decode, resize
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.retrieval import embed_images, embed_texts, fusion_scores
from pipeline.inference import build_trained_model, load_model, pyfunc_outputs
from pipeline.models import build_model
from pipeline.models.checkpoints import FORMATS
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpoint import Weights, load_weights
from tests.support.pairs import picture

TINY = VLMoConfig(
    width=64, layers=3, heads=1, vision_language_layers=1, image_size=32, patch_size=8, max_text_length=12
)
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]
PICTURES = [picture(number) for number in range(70)]  # more than one batch
TEXTS = ["a", "b c", "d e f a b", "c c c", "f"] * 14
LOAD = """
import base64, json, sys
import mlflow, pandas as pd

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
given = [json.loads(line) for line in sys.stdin]
frame = pd.DataFrame([{"image": base64.b64decode(g["image"]), "text": g["text"]} for g in given])
answer = model.predict(frame)
import pipeline
json.dump(
    {
        "rows": answer.to_dict("records"),
        "only_text": model.predict(pd.DataFrame({"text": frame["text"][:2]})).to_dict("records"),
        "without_matching": list(model.predict(frame[:1], params={"itm": False}).columns),
        "code": pipeline.__file__,
        "imported": sorted({"deepspeed", "jinja2", "ray", "rich", "transformers", "typer"} & sys.modules.keys()),
        "signature": model.metadata.signature.to_dict(),
        "example": list(model.input_example.columns),
    },
    sys.stdout,
)
"""


def imported(folder: Path) -> str:
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY))
    torch.save(FORMATS["vlmo"].write(build_model(TINY, len(VOCABULARY), seed=5).state_dict(), TINY), folder / "vlmo.pt")
    import_weights(
        str(folder / "vlmo.pt"), "vlmo", f"{folder}/weights", ["max_text_length=12"], vocabulary=f"{folder}/vocab.txt"
    )
    return f"{folder}/weights"


def track(weights: Weights) -> None:
    """Record a run as the one that trained the weights."""
    config = weights.config
    index = [stage.name for stage in config.stages].index(weights.stage)
    tracker = Tracker.open(config, Storage())
    tracker.begin_stage(index, config.stages[index], {}, [])
    tracker.finish()
    tracker.close(timeout=120)


def test_fresh_process_gets_equal_embeddings_and_scores(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    checkpoint = imported(tmp_path)
    track(load_weights(Storage(), checkpoint))
    register_checkpoint(checkpoint, "tiny", "candidate")
    told = register_checkpoint(checkpoint, "tiny", "candidate")
    given = [
        json.dumps({"image": base64.b64encode(image).decode(), "text": text})
        for image, text in zip(PICTURES, TEXTS, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, uri, told["uri"]], input="\n".join(given), capture_output=True, text=True,
        check=False, cwd=tmp_path, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    served = json.loads(done.stdout)

    weights = load_weights(Storage(), checkpoint)
    model, tokenizer = build_trained_model(weights), Tokenizer(weights.vocabulary or SPECIALS)
    images = torch.from_numpy(np.stack([resize(decode(image, 10_000), TINY.image_size) for image in PICTURES]))
    rows = [tokenizer.encode(text, 12).ids for text in TEXTS]
    image, text = embed_images(model, images), embed_texts(model, rows, tokenizer.pad_id)
    pairs = torch.arange(len(rows))[:, None].expand(-1, 2)
    expected = {
        "image_embedding": image,
        "text_embedding": text,
        "similarity": (image * text).sum(dim=1),
        "matched": fusion_scores(model, images, rows, tokenizer.pad_id, pairs).sigmoid(),
    }

    registered = load_model(told["uri"], tracking_uri=uri)
    torch.testing.assert_close(registered.encode_texts(TEXTS), text)
    with pytest.raises(TrackingError, match="not found in MLflow's registry"):
        load_model("models:/unknown@candidate", tracking_uri=uri)

    client = MlflowClient(uri)
    version = client.get_model_version_by_alias("tiny", "candidate")
    made_by = client.get_run(told["run_id"])
    assert (told["uri"], told["version"]) == ("models:/tiny@candidate", 2)
    assert (str(version.version), version.run_id, version.tags["mome.checkpoint"]) == ("2", told["run_id"], checkpoint)
    assert made_by.data.tags["stage"] == weights.stage
    assert told["model_id"] in {each.model_id for each in made_by.outputs.model_outputs}
    for name, values in expected.items():
        found = np.array([row[name] for row in served["rows"]])
        assert np.abs(found - values.numpy()).max() <= 1e-6, name
    assert [row["image_embedding"] for row in served["only_text"]] == [None, None]
    assert np.abs(np.array(served["only_text"][1]["text_embedding"]) - text[1].numpy()).max() <= 1e-6
    assert "matched" not in served["without_matching"]
    assert not Path(served["code"]).is_relative_to(Path(__file__).parents[2]), "the model's own copy of the code"
    assert served["imported"] == []
    assert served["example"] == ["image", "text"]
    assert [column["name"] for column in json.loads(served["signature"]["outputs"])] == list(expected)


def test_weights_without_embeddings_or_scores_are_rejected(tmp_path: Path) -> None:
    weights = load_weights(Storage(), imported(tmp_path))
    only_text = next(stage for stage in weights.config.stages if list(stage.objectives) == ["mlm"])
    with pytest.raises(ConfigError, match="retrieval embeddings need itc"):
        pyfunc_outputs(replace(weights, stage=only_text.name))
