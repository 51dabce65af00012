"""The tracker writes the journal, describes the run in it, and never stops training."""

import json
import math
import random
import re
import time
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.config.errors import ConfigError, StorageError, TrackingError
from pipeline.config.load import apply_override, validate
from pipeline.config.schema import RunConfig
from pipeline.config.urls import local_path
from pipeline.data.storage import Storage
from pipeline.tracking import describe
from pipeline.tracking.journal import Journal, JournalWriter
from pipeline.tracking.locations import configured_uri, journal_folder, read_journal, read_run_id, tracking_uri
from pipeline.tracking.mlflow_server import check_server
from pipeline.tracking.tracker import SavedWeights, Tracker
from pipeline.tracking.uploader import Uploader
from tests.support.failing_storage import FailingStorage, every_fault
from tests.support.fuzz import fuzz_rounds, mutate
from tests.support.journals import PHOTOS, all_records, config_of
from tests.support.short_run import NoUploader


def recorded(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [record for record in all_records(Journal(journal_folder(config.folder))) if record["kind"] == kind]


def losses(config: RunConfig) -> list[tuple[int, float]]:
    return [(point["step"], point["values"]["train/loss"]) for point in recorded(config, "metrics")]


def record(tracker: Tracker, steps: range, loss: float = 2.0) -> None:
    for step in steps:
        tracker.metrics(step, {"train/loss": loss})


def train(config: RunConfig, steps: range, loss: float = 2.0, close: bool = True, **tags: str) -> Tracker:
    tracker = Tracker.open(config, Storage(), {"world_size": "2"})
    tracker.begin_stage(0, config.stages[0], tags, [PHOTOS])
    record(tracker, steps, loss)
    if close:
        tracker.close(timeout=0)
    return tracker


def test_a_resumed_run_records_no_step_twice(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    train(config, range(0, 50))
    train(config, range(30, 80))
    tags = {(tag["stage"], tag["key"]): tag["value"] for tag in recorded(config, "tag")}
    assert losses(config) == [(step, 2.0) for step in range(80)]
    assert (tags[0, "mome.resumed_at_step"], tags[0, "mome.resumed_below_step"]) == ("30", "49")
    assert (tags[None, "mome.restarts"], len({run["run"] for run in recorded(config, "run")})) == ("1", 1)
    artifact, _ = recorded(config, "artifact")
    assert (artifact["name"], artifact["stage"]) == ("config.yaml", None)
    assert Path(config.folder, "journal", "files", artifact["file"]).read_text() == describe.config_yaml(config)

    monkeypatch.setenv("MOME_CACHE", str(tmp_path / "cache"))
    config = config_of("memory://bucket/runs", uri=f"sqlite:///{tmp_path}/mlflow.db")
    for _ in range(2):  # a new run of an old name gets a new journal
        train(config, range(5))
        assert [run["params"]["name"] for run in recorded(config, "run")] == ["run"]
        assert losses(config) == [(step, 2.0) for step in range(5)]
        Storage().delete(config.folder)  # the user deletes the run in the bucket; this machine's cache remains


def test_points_after_a_rollback_replace_the_void_ones(tmp_path):
    config = config_of(tmp_path)
    first, second = SavedWeights("run/checkpoints/20", 20, 0), SavedWeights("run/checkpoints/30", 30, 0)
    tracker = train(config, range(1, 11), close=False)
    record(tracker, range(11, 31), 50.0)
    tracker.begin_stage(0, config.stages[0], {"resumed_at": "10"}, [])
    tracker.rewind(10)
    record(tracker, range(11, 21))
    tracker.log_checkpoints([first])
    tracker.close(timeout=0)
    resumed = train(config, range(15, 31), close=False, resumed_at="20")  # a restart knows of the rollback
    resumed.log_checkpoints([first, second])
    resumed.close(timeout=0)
    assert dict(losses(config)) == dict.fromkeys(range(1, 31), 2.0)
    repeated = [*range(1, 31), *range(11, 31)]
    assert [step for step, _ in losses(config)] == repeated, "nothing but what was void is recorded twice"
    models = [(model["url"][-2:], [point["value"] for point in model["points"]]) for model in recorded(config, "model")]
    assert models == [("20", [2.0]), ("30", [2.0])], "each checkpoint is logged once"
    tags = {tag["key"]: tag["value"] for tag in recorded(config, "tag")}
    assert (tags["mome.recorded_anew_from_step"], tags["mome.recorded_anew_below_step"]) == ("10", "30")


def test_a_resume_with_changed_training_records_its_steps_again(tmp_path):
    stage, second = config_of(tmp_path).stages
    faster = stage.optimizer.model_copy(update={"lr": 1e-3})
    for name, change in {"faster": {"optimizer": faster}, "longer": {"steps": 200}, "same": {}}.items():
        train(config := config_of(tmp_path, name), range(1, 51))
        stages = stage.model_copy(update=change), second
        train(config.model_copy(update={"stages": stages}), range(31, 61), 9.0, resumed_at="30")
        assert [step for step, _ in losses(config)] == [*range(1, 51), *range(31 if change else 51, 61)]
        assert dict(losses(config))[40] == (9.0 if change else 2.0)


def test_a_failing_stage_ends_stage_and_run(tmp_path):
    config, values = config_of(tmp_path), {"third": 1 / 3, "tiny": 5e-324, "nan": math.nan, "down": -math.inf}
    tracker = Tracker.open(config, Storage())
    tracker.begin_stage(1, config.stages[1], {}, [])
    tracker.metrics(1, values)
    tracker.finish("FAILED")
    tracker.close(timeout=0)
    ends = recorded(config, "stage_end") + recorded(config, "run_end")
    assert [(end["stage"], end["status"]) for end in ends] == [(1, "FAILED"), (None, "FAILED")]
    (point,) = recorded(config, "metrics")  # numbers keep every bit, and those that JSON lacks are strings
    assert point["values"]["nan"] == "nan"
    assert repr({key: float(value) for key, value in point["values"].items()}) == repr(values)


def test_tracking_errors_are_logged_and_not_raised(tmp_path, caplog):
    closed, config = Tracker(), config_of(tmp_path, uri="http://127.0.0.1:1", required=False)
    closed.begin_stage(0, config.stages[0], {}, [])
    closed.metrics(1, {"loss": 1.0})
    closed.finish()
    closed.close()
    assert list(tmp_path.iterdir()) == [], "a tracker that was not opened records nothing"
    start, tracker = time.perf_counter(), Tracker.open(config, Storage())
    tracker.metrics(1, {"loss": "not a number"})  # type: ignore[dict-item]
    tracker.artifact("report.html", tmp_path / "absent.html")
    tracker.artifact("../report.html", b"<p>")
    tracker.metrics(2, {"train/loss": 1.0})
    tracker.close(timeout=0)
    assert time.perf_counter() - start < 20  # not the minutes of a client's retries
    expected = ("metrics failed", "artifact failed", "not a valid artifact name", "mome sync")
    assert [text for text in expected if text not in caplog.text] == []
    assert losses(config) == [(2, 1.0)], "the journal is kept although the server is down"
    check_server(config)
    with pytest.raises(TrackingError, match=r"does not answer.*tracking\.required=false"):
        check_server(config, required=True)


@pytest.mark.parametrize("password", ["hunter2/b+c", "a/hunter2@d"])
def test_addresses_are_resolved_and_their_passwords_never_recorded(tmp_path, monkeypatch, caplog, password):
    uri = f"http://me:{password}@127.0.0.1:1"
    with pytest.raises(ConfigError, match=r"tracking.uri: holds a user.*env:NAME") as refused:
        config_of(tmp_path, uri=uri)
    monkeypatch.setenv("SERVER", uri)
    config = config_of(tmp_path, uri="env:SERVER", required=False)
    train(config, range(1))
    with pytest.raises(TrackingError) as unanswered:
        check_server(config_of(tmp_path, uri="env:SERVER"))
    assert tracking_uri(config) == uri
    shown = [describe.config_yaml(config), config.model_dump_json(), caplog.text]
    assert "hunter2" not in "".join([*shown, str(refused.value), str(unanswered.value)])
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPTY", " ")
    assert configured_uri(config_of("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert configured_uri(config_of("s3://bucket/runs")) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(config_of("runs", uri="http://server:5000")) == "http://server:5000"
    for reference in ("env:ABSENT", "file:/absent", "env:EMPTY"):
        with pytest.raises(ConfigError, match=reference):
            tracking_uri(config_of(tmp_path, uri=reference))


def test_a_folder_that_cannot_be_written_and_a_damaged_run_id_are_reported_with_a_remedy(tmp_path, monkeypatch):
    config, storage, rng = config_of(tmp_path), Storage(), random.Random(6)
    whole = json.dumps({"run": "f" * 32, "name": "run"}).encode()
    for data in (b"", b"[]", b"1", b'{"run": 5}', b'{"run": "a\' or 1"}', b"[" * 100_000, b'"run"', b"{}"):
        storage.write(f"{config.folder}/tracking.json", data)
        with pytest.raises(TrackingError, match=r"(?s)tracking.json is damaged.*restore it"):
            read_run_id(config, storage)
    for data in [whole, *(mutate(whole, rng) for _ in range(fuzz_rounds(300)))]:
        storage.write(f"{config.folder}/tracking.json", data)
        with suppress(TrackingError) if data != whole else nullcontext():
            assert re.fullmatch(r"[\w.-]{1,64}", read_run_id(config, storage) or "", re.ASCII)

    (tmp_path / "file").write_text("not a folder")
    storage.write("memory://places/runs/run/journal/000001-ab.jsonl", b'{"kind":"tag"}\n')
    for cache in ("file", "file/below", "/proc/none"):
        monkeypatch.setenv("MOME_CACHE", str(tmp_path / cache))
        with pytest.raises(TrackingError, match="MOME_CACHE"):
            read_journal("memory://places/runs/run", storage)
        with pytest.raises(TrackingError, match="MOME_CACHE"):
            Tracker.open(config_of("memory://places/runs"), storage)
    storage.delete("memory://places")
    for variable in ("HOME", "MOME_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError("no such user")))
    with pytest.raises(TrackingError, match="MOME_CACHE"):
        journal_folder("s3://bucket/runs/run")
    with pytest.raises(ConfigError, match="HOME"):
        local_path("~/runs")


@pytest.mark.parametrize(
    "script", ["echo 'ImportError: mlflow from http://me:hunter2@index is broken' >&2; exit 1", "exit 7", "absent"]
)
def test_a_failing_uploader_is_reported_once_and_restarted_slowly(tmp_path, monkeypatch, caplog, script):
    program, starts, journal = tmp_path / "python", tmp_path / "starts", Journal(tmp_path / "journal")
    starts.touch()
    if script != "absent":
        program.write_text(f"#!/bin/sh\necho started >> {starts}\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setattr("pipeline.tracking.uploader.sys.executable", str(program))
    with closing(JournalWriter(journal)) as writer:
        uploader = Uploader(journal, writer, config_of(tmp_path, flush_seconds=0.02))
        deadline = time.monotonic() + 10
        while "the process that uploads" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        uploader.close(5.0)
    (report,) = (message for message in caplog.messages if "the process that uploads to MLflow" in message)
    assert ("uploader.log" in report, "hunter2" in caplog.text) == (True, False)
    assert len(starts.read_text().splitlines()) <= 8


TWO_SOURCES = ["sources.drawings={shards: drawings}", "stages.0.sources={photos: 3.0, drawings: 1.0}"]
SAME_RECIPE = [
    ["name=other", "output=s3://bucket/runs", "seed=7"],
    ["cluster.workers=8", "engine.zero_stage=2", "tracking.experiment=mine"],
    ["sources.photos.shards=s3://bucket/photos", "data.loader.num_workers=4"],
]
OTHER_RECIPE = [
    ["stages.0.steps=2000"], ["stages.0.objectives.mim.weight=2.0"], ["sources.photos.filters={width: {min: 64}}"],
    ["model={width: 192, heads: 3}"], ["engine.precision=float32"],
]  # fmt: skip


def described(*overrides: str) -> RunConfig:
    values = config_of("runs").model_dump(mode="json")
    for override in [*TWO_SOURCES, *overrides]:
        apply_override(values, override)
    return validate(values, "test")


def test_tags_describe_config_recipe_and_submission(monkeypatch):
    code = describe.code_tags()
    assert set(code) == ({describe.COMMIT, describe.DIRTY} if (Path(__file__).parents[3] / ".git").exists() else set())
    monkeypatch.setattr(describe, "code_tags", lambda: {describe.COMMIT: "here", describe.DIRTY: "true"})
    for tag, value in {"ray.submission_id": "run-1a2b-2", describe.COMMIT: "c0ffee", "image_digest": "ab12"}.items():
        monkeypatch.setenv(describe.PROPAGATED_TAGS[tag], value)
    tags = describe.run_tags(described())
    assert (tags["ray.submission_id"], tags["image_digest"]) == ("run-1a2b-2", "ab12")
    assert (tags[describe.COMMIT], tags[describe.DIRTY]) == ("c0ffee", "true")  # the launcher's code, where it is known
    note = tags["mlflow.note.content"]
    assert "| vision | mim | 75% photos, 25% drawings | 100 | 16 | previous |" in note
    assert "200 steps in runs/run" in note
    hashes = [describe.run_tags(described(*change))["recipe_hash"] for change in [*SAME_RECIPE, *OTHER_RECIPE]]
    assert [value == tags["recipe_hash"] for value in hashes] == [True] * len(SAME_RECIPE) + [False] * len(OTHER_RECIPE)
    params, changeable = describe.split_changeable(described().model_dump(mode="json"))
    assert (params["model.width"], params["stages.0.global_batch_size"]) == ("768", "16")
    assert (changeable["config.stages.0.steps"], changeable["config.engine.zero_stage"]) == ("100", "1")
    assert not any(f"config.{key}" in changeable for key in params)


def _attempts(storage: FailingStorage, output: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record two training attempts, the second after a kill, with an evaluation in between and MLflow unavailable."""
    monkeypatch.setenv("MOME_CACHE", str(cache))
    config = config_of(output, uri="http://127.0.0.1:1")

    def restarted() -> Tracker:
        try:
            return Tracker.open(config, storage)
        except StorageError:  # the run does not start; its next start meets another store
            return Tracker.open(config, Storage())

    for first, last in ((1, 20), (11, 30)):
        tracker = restarted()
        tracker.begin_stage(0, config.stages[0], {} if first == 1 else {"resumed_at": "10"}, [])
        for step in range(first, last + 1):
            tracker.metrics(step, {"train/loss": 1 / step})
            if step % 10 == 0 and step < last:
                tracker.commit()
                tracker.artifact("page.html", f"{step}".encode())
        evaluation = restarted()
        evaluation.metrics(last, {"eval/r1": 0.5})
        evaluation.close()
        tracker._writer.close()  # as when it is killed
    storage.heal()
    Tracker.open(config, storage).close()


def test_storage_faults_neither_lose_nor_double_points(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.tracking.tracker.Uploader", NoUploader)
    monkeypatch.setattr("pipeline.tracking.describe.code_tags", dict)  # calling git is slow
    output, clean = "memory://attempts", FailingStorage()
    _attempts(clean, f"{output}/clean", tmp_path / "clean", monkeypatch)
    faults = list(every_fault(clean.calls))  # of a commit alone, all are tried in test_journal.py
    assert len(faults) >= 30, len(faults)
    for number, fault in enumerate(random.Random(8).sample(faults, min(len(faults), fuzz_rounds(20)))):
        _attempts(FailingStorage(fault), f"{output}/{number}", tmp_path / f"node-{number}", monkeypatch)
        monkeypatch.setenv("MOME_CACHE", str(tmp_path / f"another-{number}"))  # the only data of a lost node
        journal = read_journal(f"{output}/{number}/run", Storage())
        points = [record for record in all_records(journal) if record["kind"] == "metrics"]
        assert [point["step"] for point in points if point["stage"] == 0] == list(range(1, 31)), fault
        assert {point["step"] for point in points if point["stage"] is None} == {20, 30}, fault
        assert len({run["run"] for run in journal.run_records()}) == 1, fault
    Storage().delete(output)
