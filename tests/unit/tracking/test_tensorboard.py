"""TensorBoard's event files hold the journal's valid points, each once, however often a run and its upload restart."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage
from pipeline.tracking import tensorboard
from pipeline.tracking.describe import config_yaml
from pipeline.tracking.journal import Journal
from pipeline.tracking.locations import journal_folder
from pipeline.tracking.tensorboard import EventFiles, check_installed, tensorboard_folder
from pipeline.tracking.tracker import Tracker
from tests.support.journals import PHOTOS, config_of

Points = list[tuple[int, float]]


def open_tracker(config: RunConfig, steps: range, loss: float, stage: int = 0) -> Tracker:
    tracker = Tracker.open(config, Storage())
    tracker.begin_stage(stage, config.stages[stage], {}, [PHOTOS])
    record(tracker, steps, loss)
    return tracker


def record(tracker: Tracker, steps: range, loss: float) -> None:
    for step in steps:
        tracker.metrics(step, {"train/loss": loss, "train/lr": step / 1000})


def points(folder: Path, key: str = "train/loss") -> Points:
    """Return what TensorBoard shows of a folder of event files."""
    return shown(EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}), key)


def shown(accumulator: EventAccumulator, key: str = "train/loss") -> Points:
    return [(event.step, event.value) for event in accumulator.Reload().Scalars(key)]


def test_each_valid_point_is_shown_once_after_restarts_and_rollbacks(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    folder, journal = tmp_path / "events", Journal(journal_folder(config.folder))
    tracker = open_tracker(config, range(1, 31), 3.0)
    killed = EventFiles(journal, folder)  # of an upload process that is killed: never closed
    killed.write()
    watching = EventAccumulator(str(folder / "0-vision"), size_guidance={"scalars": 0})
    assert shown(watching) == [(step, 3.0) for step in range(1, 31)]
    record(tracker, range(31, 41), 3.0)
    killed.write()
    assert shown(watching) == points(folder / "0-vision") == [(step, 3.0) for step in range(1, 41)]
    tracker.close(timeout=0)

    expected = [(step, 3.0) for step in range(1, 51)]
    tracker = open_tracker(config, range(21, 51), 3.0)  # resumed; steps 21 to 40 are replays
    restarted = EventFiles(journal, folder)
    restarted.write()
    assert points(folder / "0-vision") == expected
    assert len(list((folder / "0-vision").iterdir())) == 1, "the killed writer's file is deleted"

    tracker.rewind(30)
    record(tracker, range(31, 46), 2.0)
    tracker.end_stage()
    tracker.begin_stage(1, config.stages[1], {}, [])
    record(tracker, range(101, 111), 1.0)
    tracker.close(timeout=0)
    restarted.write()
    expected = [*expected[:30], *((step, 2.0) for step in range(31, 46))]
    assert points(folder / "0-vision") == expected
    assert points(folder / "1-second") == [(step, 1.0) for step in range(101, 111)]
    assert [step for step, _ in points(folder / "1-second", "train/lr")] == [*range(101, 111)]
    restarted.close()

    # The command writes the same from the journal alone.
    run = ["sync", config.folder, "--tensorboard", str(tmp_path / "later"), "--json"]
    result = json.loads(CliRunner().invoke(app, run).stdout)
    assert points(tmp_path / "later" / "0-vision") == expected
    assert result["points"] == 2 * (50 + 15 + 10)
    whole = EventAccumulator(str(tmp_path / "later"), size_guidance={"tensors": 0}).Reload()
    (text,) = tensor_util.make_ndarray(whole.Tensors("config/text_summary")[0].tensor_proto)
    assert text.decode().replace("    ", "") == config_yaml(config).rstrip().replace("    ", "")


def test_a_run_that_asks_for_event_files_needs_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    assert tensorboard_folder(config_of(tmp_path)) is None
    check_installed(config_of(tmp_path))
    config = config_of(tmp_path, tensorboard=True)
    assert tensorboard_folder(config) == Path(config.folder, "tensorboard")
    with pytest.raises(ConfigError, match=r"tracking.tensorboard: .*pip install 'mome\[tensorboard\]'"):
        check_installed(config)
