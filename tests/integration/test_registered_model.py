"""A registered model, loaded from MLflow in a fresh process, gives the outputs of its checkpoint."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from jobs.convert import import_weights
from jobs.tracking import PYFUNC_EXAMPLE, register_checkpoint
from pipeline.config.errors import ConfigError, TrackingError
from pipeline.config.schema import VLMoConfig
from pipeline.data.contents.images import decode, resize
from pipeline.data.contents.text import SPECIALS, Tokenizer
from pipeline.data.storage import Storage
from pipeline.evaluation.datasets import EvalPairs
from pipeline.evaluation.retrieval import Predictor
from pipeline.inference import build_trained_model, load, pyfunc_outputs
from pipeline.models import build_model
from pipeline.models.checkpoints.formats import FORMATS
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpoint.weights import load_weights
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
requests = [json.loads(line) for line in sys.stdin]
frame = pd.DataFrame([{"image": base64.b64decode(r["image"]), "text": r["text"]} for r in requests])
rows = model.predict(frame).to_dict("records")
import pipeline
print(json.dumps({
    "rows": rows,
    "only_text": model.predict(pd.DataFrame({"text": frame["text"][:2]})).to_dict("records"),
    "without_matching": list(model.predict(frame[:1], params={"itm": False}).columns),
    "code": pipeline.__file__,
    "imported": sorted({"deepspeed", "jinja2", "ray", "rich", "transformers", "typer"} & sys.modules.keys()),
    "outputs": [column["name"] for column in json.loads(model.metadata.signature.to_dict()["outputs"])],
    "example": list(model.input_example.columns),
}))
"""


def test_fresh_process_gets_equal_embeddings_and_scores(tmp_path: Path) -> None:
    uri, checkpoint, vocabulary = f"sqlite:///{tmp_path}/mlflow.db", f"{tmp_path}/weights", f"{tmp_path}/vocab.txt"
    Path(vocabulary).write_text("".join(f"{token}\n" for token in VOCABULARY))
    state = build_model(TINY, len(VOCABULARY), seed=5).state_dict()
    torch.save(FORMATS["vlmo"].write(state, TINY), tmp_path / "vlmo.pt")
    import_weights(f"{tmp_path}/vlmo.pt", "vlmo", checkpoint, ["max_text_length=12"], vocabulary=vocabulary)
    weights = load_weights(Storage(), checkpoint)
    index = [stage.name for stage in weights.config.stages].index(weights.stage)
    tracker = Tracker.open(weights.config, Storage())  # as the run that trained the weights
    tracker.begin_stage(index, weights.config.stages[index], {}, [])
    tracker.finish()
    tracker.close(timeout=120)
    register_checkpoint(checkpoint, "tiny", "candidate")
    registered = register_checkpoint(checkpoint, "tiny", "candidate")
    rows = zip(map(base64.b64encode, PICTURES), TEXTS, strict=True)
    requests = [json.dumps({"image": image.decode(), "text": text}) for image, text in rows]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, uri, registered["uri"]], input="\n".join(requests), capture_output=True, text=True,
        check=False, cwd=tmp_path, env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    served = json.loads(done.stdout)

    model, tokenizer = build_trained_model(weights), Tokenizer(weights.vocabulary or SPECIALS)
    images = torch.from_numpy(np.stack([resize(decode(image, 10_000), TINY.image_size) for image in PICTURES]))
    predictor, tokens = Predictor(model, tokenizer), tuple(tokenizer.encode_batch(TEXTS, 12))
    image, text = predictor.embed_images(images), predictor.embed_texts([one.ids for one in tokens])
    pairs = torch.arange(len(TEXTS))[:, None].expand(-1, 2)
    matched = predictor.fusion_scores(EvalPairs({}, "", images, tokens=tokens), pairs).sigmoid()
    expected = {"image_embedding": image, "text_embedding": text, "similarity": (image * text).sum(dim=1)}
    expected["matched"] = matched
    for name, values in expected.items():
        column = np.array([row[name] for row in served["rows"]])
        assert np.abs(column - values.numpy()).max() <= 1e-6, name
    assert [row["image_embedding"] for row in served["only_text"]] == [None, None]
    assert np.abs(np.array(served["only_text"][1]["text_embedding"]) - text[1].numpy()).max() <= 1e-6
    assert "matched" not in served["without_matching"]
    assert not Path(served["code"]).is_relative_to(Path(__file__).parents[2]), "the model's own copy of the code"
    assert (served["imported"], served["example"], served["outputs"]) == ([], ["image", "text"], list(expected))

    (tmp_path / "photo.jpg").write_bytes(PICTURES[0])  # the guide's lines, which `mome register` prints filled in
    places = {"URI": "sqlite:///runs/mlflow.db", "MODEL": "models:/retrieval@candidate"}
    guide = (Path(__file__).parents[2] / "jobs" / "README.md").read_text(encoding="utf-8")
    assert PYFUNC_EXAMPLE.replace("URI", places["URI"]).replace("MODEL", places["MODEL"]) in guide
    example = PYFUNC_EXAMPLE.replace("URI", registered["tracking_uri"]).replace("MODEL", registered["uri"])
    *lines, last = example.replace("a red circle", TEXTS[0]).splitlines()
    program = "\n".join([*lines, f"print({last}['similarity'][0])"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert float(done.stdout) == pytest.approx(expected["similarity"][0].item(), abs=1e-6)

    torch.testing.assert_close(load(registered["uri"], tracking_uri=uri).encode_text(TEXTS), text)
    with pytest.raises(TrackingError, match="not found in MLflow's registry"):
        load("models:/unknown@candidate", tracking_uri=uri)
    client, run = MlflowClient(uri), registered["run_id"]
    version, made_by = client.get_model_version_by_alias("tiny", "candidate"), client.get_run(run)
    assert (registered["uri"], registered["version"]) == ("models:/tiny@candidate", 2)
    assert (str(version.version), version.run_id, version.tags["mome.checkpoint"]) == ("2", run, checkpoint)
    assert made_by.data.tags["stage"] == weights.stage
    assert registered["model_id"] in {output.model_id for output in made_by.outputs.model_outputs}
    only_text = next(stage for stage in weights.config.stages if list(stage.objectives) == ["mlm"])
    with pytest.raises(ConfigError, match="retrieval embeddings need itc"):  # neither embeddings nor scores
        pyfunc_outputs(only_text, weights.url)
