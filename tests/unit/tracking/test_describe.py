"""Description of a run: recipe hash, summary, environment tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.tracking.describe import environment_tags, job_environment, note_of_stage, run_tags


def config_of(stage: dict[str, Any] | None = None, source: dict[str, Any] | None = None, **values: Any) -> RunConfig:
    stages = [
        {"name": "vision", "sources": {"photos": 3.0, "drawings": 1.0}, "objectives": {"mim": {}}},
        {"name": "second", "sources": {"photos": 1.0}, "objectives": {"mim": {}}},
    ]
    base = {
        "name": "run",
        "sources": {"photos": {"shards": "photos", **(source or {})}, "drawings": {"shards": "drawings"}},
        "stages": [{"steps": 1000, "global_batch_size": 16, **each, **(stage or {})} for each in stages],
    }
    return validate(base | values, "test")


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"name": "other", "output": "s3://bucket/runs", "seed": 7}, True),
        ({"cluster": {"workers": 8}, "engine": {"zero_stage": 2}, "tracking": {"experiment": "mine"}}, True),
        ({"source": {"shards": "s3://bucket/photos"}, "data": {"loader": {"num_workers": 4}}}, True),
        ({"stage": {"steps": 2000}}, False),
        ({"stage": {"objectives": {"mim": {"weight": 2.0}}}}, False),
        ({"source": {"filters": {"width": {"min": 64}}}}, False),
        ({"model": {"width": 192, "heads": 3}}, False),
        ({"engine": {"precision": "float32"}}, False),
    ],
)
def test_recipe_hash_depends_on_what_is_learnt_only(change: dict[str, Any], is_same: bool) -> None:
    assert (run_tags(config_of(**change))["recipe_hash"] == run_tags(config_of())["recipe_hash"]) == is_same


def test_the_summary_describes_every_stage() -> None:
    config = config_of()
    note = run_tags(config)["mlflow.note.content"]
    assert "| vision | mim | 75% photos, 25% drawings | 1,000 | 16 | previous |" in note
    assert "2,000 steps in runs/run" in note
    assert "Started from random weights." in note_of_stage(config.stages[0], "random")


def test_job_environment_passes_submission_id_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = job_environment("run-1a2b-2")
    here = environment_tags()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MOME_IMAGE_DIGEST", "sha256:ab12")
    tags = environment_tags()
    assert (tags["ray.submission_id"], tags["image_digest"]) == ("run-1a2b-2", "sha256:ab12")
    if (Path(__file__).parents[3] / ".git").exists():
        assert environment["MOME_GIT_COMMIT"] == here["mlflow.source.git.commit"]
        assert environment["MOME_GIT_DIRTY"] == here["mome.git.dirty"]
