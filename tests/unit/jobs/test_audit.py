"""`mome fingerprint` accepts what `mome train` accepts, and changes nothing of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.audit import fingerprint_of
from pipeline.config.errors import ConfigError
from pipeline.config.load import with_absolute_paths
from pipeline.data.storage import Storage
from pipeline.training.prepare import RUN_FILE, prepare
from tests.support.short_run import short_config


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file under a folder, with when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_fingerprint_claims_no_name(tmp_path: Path) -> None:
    found = fingerprint_of(short_config(str(tmp_path)), "pairs", "0:2", 1, 0, 1)
    assert not (tmp_path / "run").exists()
    prepare(short_config(str(tmp_path), seed=9), Storage())
    assert fingerprint_of(short_config(str(tmp_path), seed=9), "pairs", "0:2", 1, 0, 1) != found


def test_a_fingerprint_of_a_run_changes_nothing_and_is_equal(tmp_path: Path) -> None:
    config = short_config(str(tmp_path), tokenizer__size=40)
    before = fingerprint_of(config, "pairs", "0:2", 1, 0, 1)
    prepare(config, Storage())
    files = contents(tmp_path)
    assert fingerprint_of(config, "pairs", "0:2", 2, 0, 2) == before
    changed = short_config(str(tmp_path), tokenizer__size=40, data__loader__prefetch_batches=5)
    assert fingerprint_of(changed, "pairs", "0:2", 1, 1, 1) == before
    assert contents(tmp_path) == files


def test_what_training_would_refuse_is_refused(tmp_path: Path) -> None:
    prepare(short_config(str(tmp_path)), Storage())
    with pytest.raises(ConfigError, match="seed: was 7, now 9"):
        fingerprint_of(short_config(str(tmp_path), seed=9), None, "0:1", 1, 0, 1)
    (tmp_path / "run" / RUN_FILE).write_text('{"name": null}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not a config of this version"):
        fingerprint_of(short_config(str(tmp_path)), None, "0:1", 1, 0, 1)


def test_a_run_with_relative_paths_is_fingerprinted_by_the_config_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = short_config("runs")
    tokenizer = prepare(with_absolute_paths(config), Storage())
    tokenizer.save(Storage(), "vocab.txt")
    config = short_config("runs", name="other", tokenizer__vocabulary="vocab.txt")
    prepare(with_absolute_paths(config), Storage())
    assert fingerprint_of(config, "pairs", "0:1", 1, 0, 1)["steps"] == [0, 1]
