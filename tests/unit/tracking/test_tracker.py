"""The tracker writes the journal and never stops training."""

from __future__ import annotations

import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import redaction
from pipeline.config.errors import ConfigError, StorageError, TrackingError
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.data.storage import Storage
from pipeline.tracking.describe import config_yaml, split_changeable
from pipeline.tracking.journal import Journal
from pipeline.tracking.locations import journal_folder, read_journal, tracking_uri
from pipeline.tracking.mlflow_server import check_server
from pipeline.tracking.tracker import DatasetInput, SavedWeights, Tracker
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds
from tests.support.journals import config_of
from tests.support.short_run import NoUploader


def recorded(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [record for record in Journal(journal_folder(config.folder)).all_records() if record["kind"] == kind]


def opened(config: RunConfig, stage: StageConfig | None = None, **tags: str) -> Tracker:
    """Return a tracker that has begun the first stage."""
    tracker = Tracker.open(config, Storage(), {"world_size": "2"})
    tracker.begin_stage(0, stage or config.stages[0], tags, [DatasetInput("photos", "here", "ab" * 32)])
    return tracker


def record(tracker: Tracker, steps: range, loss: float = 2.0) -> None:
    for step in steps:
        tracker.metrics(step, {"train/loss": loss})


def train(config: RunConfig, steps: range) -> None:
    tracker = opened(config)
    record(tracker, steps)
    tracker.close(timeout=0)


def test_a_resumed_run_records_no_step_twice(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    train(config, range(0, 50))
    train(config, range(30, 80))

    points = recorded(config, "metrics")
    tags = {(tag["stage"], tag["key"]): tag["value"] for tag in recorded(config, "tag")}

    assert [point["step"] for point in points] == list(range(80))
    assert (tags[0, "mome.resumed_at_step"], tags[0, "mome.resumed_below_step"]) == ("30", "49")
    assert tags[None, "mome.restarts"] == "1"
    assert len({campaign["run"] for campaign in recorded(config, "run")}) == 1


def loss_of(config: RunConfig) -> dict[int, float]:
    """Return the valid loss of each step, which is the last recorded one."""
    return {point["step"]: point["values"]["train/loss"] for point in recorded(config, "metrics")}


def test_points_after_a_rollback_replace_the_void_ones(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    tracker = opened(config)
    record(tracker, range(1, 11))
    record(tracker, range(11, 31), loss=50.0)
    tracker.begin_stage(0, config.stages[0], {"resumed_at": "10"}, [])
    tracker.rewind(10)
    record(tracker, range(11, 21))
    tracker.log_checkpoints([SavedWeights("run/checkpoints/20", 20, 0)])
    tracker.close(timeout=0)
    resumed = opened(config, resumed_at="20")  # a restart knows of the rollback
    record(resumed, range(15, 31))
    resumed.log_checkpoints([SavedWeights("run/checkpoints/20", 20, 0), SavedWeights("run/checkpoints/30", 30, 0)])
    resumed.close(timeout=0)

    assert loss_of(config) == dict.fromkeys(range(1, 31), 2.0)
    steps = [point["step"] for point in recorded(config, "metrics")]
    assert steps == [*range(1, 31), *range(11, 31)], "nothing but what was void is recorded twice"
    assert [model["url"][-2:] for model in recorded(config, "model")] == ["20", "30"], "each checkpoint is logged once"
    for model in recorded(config, "model"):
        assert [point["value"] for point in model["points"]] == [2.0], model["url"]
    tags = {tag["key"]: tag["value"] for tag in recorded(config, "tag")}
    assert (tags["mome.recorded_anew_from_step"], tags["mome.recorded_anew_below_step"]) == ("10", "30")


@pytest.mark.parametrize(("change", "anew"), [("lr", True), ("steps", True), ("nothing", False)])
def test_a_resume_with_changed_training_records_its_steps_again(tmp_path: Path, change: str, anew: bool) -> None:
    config = config_of(tmp_path)
    train(config, range(1, 51))
    stage = config.stages[0]
    optimizer = stage.optimizer.model_copy(update={"lr": 1e-3})
    changes: dict[str, dict[str, Any]] = {"lr": {"optimizer": optimizer}, "steps": {"steps": 200}, "nothing": {}}
    tracker = opened(config, stage.model_copy(update=changes[change]), resumed_at="30")
    record(tracker, range(31, 61), loss=9.0)
    tracker.close(timeout=0)

    assert [point["step"] for point in recorded(config, "metrics")] == [*range(1, 51), *range(31 if anew else 51, 61)]
    assert loss_of(config)[40] == (9.0 if anew else 2.0)


def test_a_new_run_of_an_old_name_gets_a_new_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "cache"))
    config = config_of("memory://bucket/runs", uri=f"sqlite:///{tmp_path}/mlflow.db")
    train(config, range(0, 5))
    Storage().delete(config.folder)  # the user deletes the run in the bucket; this machine's cache remains

    train(config, range(0, 5))

    assert [campaign["params"]["name"] for campaign in recorded(config, "run")] == ["run"]
    assert [point["step"] for point in recorded(config, "metrics")] == list(range(5))
    Storage().delete(config.folder)


def test_a_failing_stage_ends_stage_and_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    tracker = Tracker.open(config, Storage())
    tracker.begin_stage(1, config.stages[1], {}, [])
    tracker.finish("FAILED")
    tracker.close(timeout=0)

    ends = recorded(config, "stage_end") + recorded(config, "run_end")
    assert [(end["stage"], end["status"]) for end in ends] == [(1, "FAILED"), (None, "FAILED")]


def test_numbers_keep_every_bit_including_non_finite_ones(tmp_path: Path) -> None:
    config, values = config_of(tmp_path), {"third": 1 / 3, "tiny": 5e-324, "nan": math.nan, "down": -math.inf}
    tracker = opened(config)
    tracker.metrics(1, values)
    tracker.close(timeout=0)

    (record,) = recorded(config, "metrics")
    assert record["values"]["nan"] == "nan"
    assert repr({key: float(value) for key, value in record["values"].items()}) == repr(values)


def test_tracking_errors_are_logged_and_not_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path)
    tracker = Tracker.open(config, Storage())

    tracker.metrics(1, {"loss": "not a number"})  # type: ignore[dict-item]
    tracker.artifact("report.html", tmp_path / "absent.html")
    tracker.close(timeout=0)

    assert "metrics failed" in caplog.text
    assert "artifact failed" in caplog.text


def test_closing_early_keeps_the_journal_and_names_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    config = config_of(tmp_path, uri="http://127.0.0.1:1", required=False)
    start = time.perf_counter()

    train(config, range(3))

    assert time.perf_counter() - start < 20  # not the minutes of a client's retries
    assert "mome sync" in caplog.text
    assert len(recorded(config, "metrics")) == 3


def test_changeable_keys_are_tags_and_others_params(tmp_path: Path) -> None:
    params, tags = split_changeable(config_of(tmp_path).model_dump(mode="json"))

    assert params["model.width"] == "768"
    assert params["stages.0.global_batch_size"] == "16"
    assert tags["config.stages.0.steps"] == "100"
    assert tags["config.engine.zero_stage"] == "1"
    assert not any(f"config.{key}" in tags for key in params)


@pytest.mark.parametrize("password", ["hunter2/b+c", "a/hunter2@d"])
def test_passwords_in_addresses_are_never_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, password: str
) -> None:
    monkeypatch.setattr(redaction, "_known", set())
    uri = f"http://me:{password}@127.0.0.1:1"
    with pytest.raises(ConfigError, match=r"tracking.uri: holds a user.*env:NAME") as refused:
        config_of(tmp_path, uri=uri)
    monkeypatch.setenv("SERVER", uri)
    config = config_of(tmp_path, uri="env:SERVER", required=False)
    train(config, range(1))
    with pytest.raises(TrackingError) as unanswered:
        check_server(config_of(tmp_path, uri="env:SERVER"))

    assert tracking_uri(config) == uri
    shown = [config_yaml(config), config.model_dump_json(), caplog.text, str(refused.value), str(unanswered.value)]
    assert "hunter2" not in "".join(shown)
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("reference", ["env:ABSENT", "file:/absent", "env:EMPTY"])
def test_an_unresolvable_reference_is_rejected_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.setenv("EMPTY", " ")

    with pytest.raises(ConfigError, match=reference):
        tracking_uri(config_of(tmp_path, uri=reference))


def test_the_default_database_is_next_to_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert tracking_uri(config_of("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert tracking_uri(config_of("s3://bucket/runs")) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(config_of("runs", uri="http://server:5000")) == "http://server:5000"


def test_an_unreachable_server_prevents_the_start(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"does not answer.*tracking\.required=false"):
        check_server(config_of(tmp_path, uri="http://127.0.0.1:1"))
    check_server(config_of(tmp_path, uri="http://127.0.0.1:1", required=False))


def test_an_impossible_database_prevents_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(TrackingError, match="not a writable folder"):
        check_server(config_of(tmp_path, uri=f"sqlite:///{tmp_path}/file/mlflow.db"))
    with pytest.raises(TrackingError, match="file store"):
        check_server(config_of(tmp_path, uri=f"file://{tmp_path}/mlruns"))
    check_server(config_of(tmp_path))


def test_the_resolved_config_is_an_artifact_of_the_run(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    train(config, range(1))

    (record,) = recorded(config, "artifact")
    assert (record["name"], record["stage"]) == ("config.yaml", None)
    assert (journal_folder(config.folder) / "files" / record["file"]).read_text() == config_yaml(config)


def _attempts(storage: FailingStorage, output: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record two training attempts, the second after a kill, with an evaluation in between and MLflow unavailable."""
    monkeypatch.setenv("MOME_CACHE", str(cache))
    config = config_of(output, uri="http://127.0.0.1:1")

    def opened() -> Tracker:
        try:
            return Tracker.open(config, storage)
        except StorageError:  # the run does not start; its next start meets another store
            return Tracker.open(config, Storage())

    for first, last in ((1, 20), (11, 30)):
        tracker = opened()
        tracker.begin_stage(0, config.stages[0], {} if first == 1 else {"resumed_at": "10"}, [])
        for step in range(first, last + 1):
            tracker.metrics(step, {"train/loss": 1 / step})
            if step % 10 == 0 and step < last:
                tracker.commit(step)
                tracker.artifact("page.html", f"{step}".encode())
        evaluation = opened()
        evaluation.metrics(last, {"eval/r1": 0.5})
        evaluation.close()
        tracker._writer.close()  # as when it is killed
    storage.heal()
    tracker = Tracker.open(config, storage)
    tracker.close()


def test_storage_faults_neither_lose_nor_double_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.tracker.Uploader", NoUploader)
    monkeypatch.setattr("pipeline.tracking.describe.environment_tags", dict)  # calling git is slow
    output = "memory://attempts"
    clean = FailingStorage()
    _attempts(clean, f"{output}/clean", tmp_path / "clean", monkeypatch)
    faults = list(every_fault(clean.calls))  # of a commit alone, all are tried in test_committed.py
    tried = random.Random(8).sample(faults, min(len(faults), fuzz_rounds(20)))
    for number, fault in enumerate(tried):
        storage = FailingStorage(fault)
        _attempts(storage, f"{output}/{number}", tmp_path / f"node-{number}", monkeypatch)

        monkeypatch.setenv("MOME_CACHE", str(tmp_path / f"another-{number}"))  # the only data of a lost node
        journal = read_journal(f"{output}/{number}/run", Storage())

        points = [record for record in journal.all_records() if record["kind"] == "metrics"]
        assert [point["step"] for point in points if point["stage"] == 0] == list(range(1, 31)), fault
        assert {point["step"] for point in points if point["stage"] is None} == {20, 30}, fault
        assert len({campaign["run"] for campaign in journal.run_records()}) == 1, fault
    Storage().delete(output)
    assert len(faults) >= 30, len(faults)
