"""Untrained weights on drawn scenes, alone or in the folder of a finished run, for tests of what reads them."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.contents.text import Tokenizer
from pipeline.data.reading.samples import iter_captions
from pipeline.data.storage import Storage
from pipeline.models import build_model
from pipeline.objectives import head_config
from pipeline.tracking.journal import Journal, JournalWriter
from pipeline.training.checkpoint.weights import save_weights, stage_url
from tests.support.short_run import short_config

SCENES = 12
SECTION = {
    "width": 32,
    "init_std": 0.02,
    "layers": 2,
    "heads": 2,
    "vision_language_layers": 1,
    "image_size": 32,
    "patch_size": 8,
}


def draw(folder: Path, seed: int = 0) -> str:
    """Draw a folder of shards and return its path."""
    drawn = {"scenes": SCENES, "image_size": 32, "captions": 2, "seed": seed}
    config = config_of(folder.parent, {"drawn": {"shards": str(folder), "synthetic": drawn}}, "drawn")
    build_synthetic(Storage(), config.sources)
    return str(folder)


def config_of(output: Path, sources: dict[str, Any], source: str, **more: Any) -> RunConfig:
    stage = {"name": "pairs", "sources": {next(iter(sources)): 1.0}, "objectives": {"itc": {}, "itm": {}}}
    stage |= {"steps": 4, "global_batch_size": 8, "max_text_length": 24}
    values = {
        "name": "run", "output": str(output), "model": SECTION, "sources": sources, "data": {"streams": 4},
        "stages": [stage], "engine": {"precision": "float32"}, "evaluation": {"source": source, "batch_size": 8},
    }  # fmt: skip
    return RunConfig.model_validate_json(json.dumps(values | more))


def save_untrained(config: RunConfig, index: int, shards: str, url: str, step: int) -> None:
    """Save random weights as those of stage `index`, with a vocabulary of the captions in `shards`."""
    tokenizer = Tokenizer.train(iter_captions(Storage(), shards), 200)
    model = build_model(config.model, tokenizer.size, head_config(config, index), seed=1)
    metadata = {"config": config.model_dump(mode="json"), "stage": config.stages[index].name, "step": step}
    save_weights(Storage(), url, dict(model.state_dict()), list(tokenizer.tokens), metadata)


def untrained_weights(folder: Path) -> tuple[RunConfig, str]:
    """Write untrained weights of a run's second stage and its drawn scenes; return the config and the weights' URL."""
    config = short_config(str(folder), evaluation={"source": "scenes", "max_images": 22, "batch_size": 5})
    build_synthetic(Storage(), config.sources)
    url = stage_url(config, 1)
    save_untrained(config, 1, config.sources["scenes"].shards, url, step=16)
    return config, url


def write_run(folder: Path, recorded: RunConfig, shards: str, run: str | None = "c0ffee") -> str:
    """Write the folder of a finished run with the config `recorded` and the MLflow run id `run` (None: untracked)."""
    save_untrained(recorded, 0, shards, f"{folder}/stages/0-pairs", step=4)
    (folder / "run.json").write_text(recorded.model_dump_json(), encoding="utf-8")
    if run is not None:
        (folder / "tracking.json").write_text(json.dumps({"run": run, "name": recorded.name}), encoding="utf-8")
        about = {"uri": recorded.tracking.uri or "sqlite:///none", "experiment": "e", "server_has_more": False}
        start = {"params": {}, "tags": {}, "datasets": []}
        with closing(JournalWriter(Journal(folder / "journal"))) as writer:
            writer.append({"kind": "run", "at": 1, "stage": None, "run": run, "name": recorded.name, **about, **start})
            writer.append({"kind": "stage", "at": 2, "stage": 0, "name": "pairs", **start})
            writer.append({"kind": "metrics", "at": 3, "stage": 0, "step": 4, "values": {"train/loss": 2.0}})
    return str(folder)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return path -> (modification time, bytes) of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
