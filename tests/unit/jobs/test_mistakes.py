"""Mistakes of the first hour: every answer names the key or file, the cause and the remedy, and nothing is written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config.errors import MomeError
from pipeline.config.load import validate
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.storage import Storage
from pipeline.training.prepare import prepare
from tests.support.finished_run import contents
from tests.support.short_run import short_config

TRAIN = "train run.yaml name=new"
MISTAKES: dict[str, tuple[int, tuple[str, ...]]] = {  # command -> exit status, phrases of the answer
    # the file
    "train nosuch.yaml": (2, ("nosuch.yaml: no such file, and no such recipe", "mome config list")),
    "train rum.yaml": (2, ("did you mean run.yaml?",)),
    "plan vlmo_bas": (2, ("no such recipe; did you mean vlmo_base?",)),
    "train empty.yaml": (2, ("empty.yaml: it is empty", "mome config new")),
    "train tabs.yaml": (2, ("tabs.yaml: not valid YAML", "line 2", "Indent with spaces, not with tabs")),
    "train duplicate.yaml": (2, ("duplicate key 'name' in line 2",)),
    # keys
    "train run.yaml engine.zero_stag=3": (2, ("one fault", "engine.zero_stag: unknown key", "'zero_stage'")),
    "train run.yaml model.width=wide stages.pairs.steps=0 seeed=1": (
        2, ("3 faults", "model.width: ", "(got 'wide')", "stages.pairs.steps: ", "seeed: ", "'seed'")
    ),
    "train run.yaml lr=1e-3": (2, ("did you mean stages.vision.optimizer.lr or stages.pairs.optimizer.lr?",)),
    "train run.yaml optimiser.lr=1e-3": (2, ("optimiser: unknown key", "stages.pairs.optimizer.lr?")),
    "train run.yaml --steps 10": (2, ("no option --steps", "stages.NAME.steps=10")),
    "train run.yaml stages.pair.steps=3": (2, ("no element 'pair'", "vision, pairs", "did you mean 'pairs'?")),
    "train run.yaml sources.scene.type=text": (2, ("sources.scene.shards: ", "did you mean the source 'scenes'?")),
    "train run.yaml stages.pairs.steps": (2, ("expected key=value",)),
    # values
    "train run.yaml name=my\u00a0run": (2, ("name: expected letters, digits", "did you mean 'my_run'?")),
    "train run.yaml stages.pairs.global_batch_size=abc": (2, ("one fault", "stages.pairs.global_batch_size: ")),
    "train run.yaml stages.pairs.global_batch_size=9": (2, ("9 must be a multiple of data.streams 4",)),
    "train run.yaml model.kind=clip": (2, ("model.kind: expected 'vlmo', 'vilt'", "(got 'clip')")),
    "train run.yaml model.patch_size=7": (2, ("image_size 24 must be a multiple of patch_size 7",)),
    "train run.yaml sources.scenes.type=txt": (2, ("sources.scenes.type: ", "did you mean 'text'?")),
    "train run.yaml sources.scenes.type=text": (2, ("stages.pairs.objectives: itc needs sources of type pairs",)),
    "train run.yaml storage.key=AKIA123": (2, ("storage.key: is a secret", "'env:NAME' or 'file:PATH'")),
    "train run.yaml tracking.uri=http://me:word@host": (2, ("tracking.uri: holds a user", "MLFLOW_TRACKING_USERNAME")),
    "train run.yaml stages.vision.freeze=[vision_expet]": (2, ("stages.vision: freeze: ", "'vision_expert'?")),
    "train run.yaml evaluation.source=test": (2, ("evaluation.source: unknown source 'test'; known: scenes",)),
    # what the config names
    "train run.yaml seed=9": (2, ("seed: was 7, now 9", "Restore the old values, or choose another `name`")),
    f"{TRAIN} tokenizer.vocabulary=nosuch.txt": (2, ("tokenizer.vocabulary: ", "nosuch.txt does not exist")),
    f"{TRAIN} sources.scenes.shards=nosuch": (1, ("sources.scenes.shards: ", "no such folder of shards", "build")),
    f"{TRAIN} sources.scenes.shards=truncated": (1, ("sources.scenes.shards: ", "000000.tar: the shard was truncated")),
    f"{TRAIN} stages.vision.start_from=nosuch": (1, ("stages.vision.start_from: ", "no finished stage", "give the")),
    f"{TRAIN} tracking.required=true tracking.uri=http://127.0.0.1:9": (1, ("http://127.0.0.1:9: the server",)),
    f"{TRAIN} output=s3://bucket/runs": (1, ("s3://bucket/runs/new", "no credentials", "AWS_ACCESS_KEY_ID")),
    f"{TRAIN} cluster.gpus_per_worker=64 --dry-run": (2, ("2 ranks need 128 GPUs", "gpus_per_worker=0")),
    # other commands
    "plan run.yaml --accelerator h1000": (2, ("--accelerator h1000: did you mean 'h100'?",)),
    "plan run.yaml --gpus 64": (2, ("stages.pairs.global_batch_size: 8 leaves a rank without an example", "= 64")),
    "evaluate nosuch": (1, ("nosuch: contains no finished stage", "give the folder of a run")),
    "import nosuch.pt --format vlmo --out out": (1, ("nosuch.pt: no such file", "give a published checkpoint")),
    "import run.yaml --format vlmoo --out out": (2, ("--format vlmoo: unknown; known: vlmo, vilt",)),
    "compare data": (2, ("expected two runs or more, got 1",)),
    "report nosuch": (2, ("nosuch: no run there", "give the folder of a run")),
    "shards build broken.jsonl out": (1, ("broken.jsonl, line 2: not JSON", "line 3: expected", "--images")),
    "shards build missing.jsonl data/scenes": (1, ("data/scenes already has shards", "--overwrite")),
    "shards check data/scenes --type txt": (2, ("--type", "'txt' is not one of", "'images', 'text'")),
    "submit run.yaml --address http://127.0.0.1:1": (1, ("http://127.0.0.1:1: no Ray dashboard", "ray start")),
    "jobs list --address http://127.0.0.1:1 --token plain": (2, ("--token: is a secret", "env:NAME or file:PATH")),
    "doctor seed=3": (2, ("give one with --config",)),
    "config copy dmeo": (2, ("did you mean demo?",)),
    "config explain xyzzy": (2, ("no key 'xyzzy'",)),
    "config new run.yaml --data data/scenes": (2, ("run.yaml exists already",)),
    "trian run.yaml": (2, ("No such command 'trian'", "Did you mean 'train'?")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Return a folder with shards, a prepared run, and the files that the commands name."""
    folder = Path(tmp_path_factory.mktemp("mistakes"))
    config = short_config(str(folder / "runs"), data=str(folder / "data"), tokenizer__size=40)
    values = config.model_dump(mode="json", exclude_unset=True)
    build_synthetic(Storage(), config.sources)
    del values["sources"]["scenes"]["synthetic"]
    (folder / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    prepare(validate(values, "run.yaml"), Storage())
    shutil.copytree(folder / "data" / "scenes", folder / "truncated")
    shard = next((folder / "truncated").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    files = {"empty.yaml": "", "tabs.yaml": "name: a\n\tseed: 1\n", "duplicate.yaml": "name: a\nname: b\n"}
    missing = '{"image": "a.jpg", "captions": ["x"]}\n'
    files |= {"missing.jsonl": missing, "broken.jsonl": f'{missing}{{broken\n{{"image": 3}}\n'}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", MISTAKES)
def test_answer_names_what_is_wrong_and_what_to_do(command: str, folder: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_PROFILE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    before, (status, phrases) = contents(folder), MISTAKES[command]
    done = CliRunner().invoke(app, [part.replace("\u00a0", " ") for part in command.split(" ")])
    error = done.exception
    answer = f"{done.output}\n{capfd.readouterr().err}\n{error}"
    assert (error.exit_status if isinstance(error, MomeError) else done.exit_code) == status, answer
    assert [phrase for phrase in phrases if phrase not in answer] == [], answer
    assert isinstance(error, MomeError | SystemExit), answer
    assert contents(folder).keys() - before.keys() == set()
    assert "Traceback" not in answer
    assert "WARNING" not in answer
