"""Recipes, the table of objectives, and `mome fingerprint`, which does not modify the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.configs import fingerprint_of, list_recipes, read_recipe
from pipeline.config.errors import ConfigError
from pipeline.config.load import with_absolute_paths
from pipeline.config.schema import MODEL_SECTIONS, objective_names
from pipeline.data.storage import Storage
from pipeline.training.prepare import RUN_FILE, prepare
from tests.support.short_run import short_config
from tests.support.trial import cells


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and modification time of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_fingerprint_does_not_claim_the_run_name(tmp_path: Path) -> None:
    found = fingerprint_of(short_config(str(tmp_path)), "pairs", "0:2", 1, 0, 1)
    assert not (tmp_path / "run").exists()
    prepare(short_config(str(tmp_path), seed=9), Storage())
    assert fingerprint_of(short_config(str(tmp_path), seed=9), "pairs", "0:2", 1, 0, 1) != found


def test_fingerprint_of_a_run_is_equal_and_changes_no_file(tmp_path: Path) -> None:
    config = short_config(str(tmp_path), tokenizer__size=40)
    before = fingerprint_of(config, "pairs", "0:2", 1, 0, 1)
    prepare(config, Storage())
    files = contents(tmp_path)
    assert fingerprint_of(config, "pairs", "0:2", 2, 0, 2) == before
    changed = short_config(str(tmp_path), tokenizer__size=40, data__loader__prefetch_batches=5)
    assert fingerprint_of(changed, "pairs", "0:2", 1, 1, 1) == before
    assert contents(tmp_path) == files


def test_config_that_training_rejects_is_rejected(tmp_path: Path) -> None:
    prepare(short_config(str(tmp_path)), Storage())
    with pytest.raises(ConfigError, match="seed: was 7, now 9"):
        fingerprint_of(short_config(str(tmp_path), seed=9), None, "0:1", 1, 0, 1)
    (tmp_path / "run" / RUN_FILE).write_text('{"name": null}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not a config of this version"):
        fingerprint_of(short_config(str(tmp_path)), None, "0:1", 1, 0, 1)


def test_fingerprint_accepts_a_run_with_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = short_config("runs")
    tokenizer = prepare(with_absolute_paths(config), Storage())
    Storage().write("vocab.txt", tokenizer.vocabulary_file)
    config = short_config("runs", name="other", tokenizer__vocabulary="vocab.txt")
    prepare(with_absolute_paths(config), Storage())
    assert fingerprint_of(config, "pairs", "0:1", 1, 0, 1)["steps"] == [0, 1]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_recipe_is_listed_and_shown_in_full() -> None:
    recipes = json.loads(run("config", "list", "--json"))
    assert recipes["demo"] == "vlmo: vision → language → vision_language"
    assert "finetune/vilt_b32_vqa" in recipes
    assert recipes == list_recipes()
    assert run("config", "show", "configs/demo.yaml") == read_recipe("demo")


def test_unknown_recipe_is_rejected_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'dmeo'; expected one of demo, "):
        read_recipe("dmeo")


def test_schema_describes_the_config() -> None:
    schema = json.loads(run("config", "schema"))
    assert {"name", "model", "sources", "stages"} <= schema["properties"].keys()


def test_objective_table_has_every_trainable_combination() -> None:
    table = json.loads(run("objectives", "--json"))["objectives"]
    assert list(table) == list(objective_names())
    listed = {
        (objective, kind, source_type)
        for objective, row in table.items()
        for kind, source_types in row.items()
        for source_type in source_types
    }
    assert listed == {(cell.objective, cell.kind, cell.source_type) for cell in cells()}


def test_text_has_a_column_per_kind_and_a_line_per_objective() -> None:
    lines = run("objectives").splitlines()
    assert lines[0].split() == ["objective", *MODEL_SECTIONS]
    assert [line.split()[0] for line in lines[1:]] == list(objective_names())
    assert next(line for line in lines if line.startswith("nlvr2")).split()[1:] == ["statements"] * 2 + ["·"] * 3
