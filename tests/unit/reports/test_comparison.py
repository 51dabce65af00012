"""`mome compare`: exactly the keys that differ, and the results of every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app, main
from pipeline.reports.comparison import compare
from pipeline.reports.run_folder import open_run
from tests.support.bad_shards import Planted
from tests.support.recorded_run import SECONDS, STEPS, record_run


def test_exactly_the_changed_keys_differ(runs: Path) -> None:
    found = compare([open_run(str(runs / "recorded")), open_run(str(runs / "other"))])
    assert found.config == {
        "seed": {"recorded": 0, "other": 5},
        "model.width": {"recorded": 32, "other": 64},
        "stages.pairs.global_batch_size": {"recorded": 8, "other": 16},
    }
    differing = {row.name for rows in found.results.values() for row in rows if row.differs}
    assert differing == set()


def test_of_a_stage_that_one_run_lacks_only_what_it_sets_is_told(runs: Path, planted: Planted, tmp_path: Path) -> None:
    record_run(tmp_path, planted, "shorter")
    path = tmp_path / "shorter" / "run.json"
    config = json.loads(path.read_text())
    config["stages"] = config["stages"][1:]
    path.write_text(json.dumps(config))
    for session in (tmp_path / "shorter" / "journal").glob("*.jsonl"):
        session.unlink()
    found = compare([open_run(str(runs / "recorded")), open_run(str(tmp_path / "shorter"))])
    own = {path.removeprefix("stages.vision.") for path in found.config if path.startswith("stages.vision.")}
    assert own == {"sources.pictures", "steps", "batch", "max_text_length"}
    assert all("shorter" not in values for path, values in found.config.items() if path.startswith("stages.vision."))


def test_the_command_prints_results_for_machines_and_writes_a_page(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "beside.html"
    arguments = ["compare", str(runs / "recorded"), str(runs / "other"), "--html", str(page), "--json"]
    told = json.loads(CliRunner().invoke(app, arguments).stdout.splitlines()[-1])
    assert told["runs"] == ["recorded", "other"]
    assert told["results"]["vision"]["recorded"] is not None
    assert told["results"]["eval/pairs/i2t_r1"] == {"recorded": 0.5, "other": 0.5}
    assert told["results"]["steps"]["other"] == 2 * STEPS
    assert told["results"]["goodput"]["other"] == SECONDS["training"] / sum(SECONDS.values())
    assert "stages.pairs.global_batch_size" in page.read_text()
    table = CliRunner().invoke(app, arguments[:3]).stdout
    assert "stages.pairs.global_batch_size" in table
    assert "model.layers" not in table


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_folder_without_a_run_ends_the_command_with_status_2(
    command: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [str(runs / "recorded")] if command == "compare" else []
    monkeypatch.setattr("sys.argv", ["mome", command, *others, str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"{tmp_path}: no run there" in capsys.readouterr().err


def test_runs_of_one_name_go_by_their_folders(runs: Path, planted: Planted, tmp_path: Path) -> None:
    record_run(tmp_path, planted)
    found = compare([open_run(str(runs / "recorded")), open_run(str(tmp_path / "recorded"))])
    assert found.runs == [str(runs / "recorded"), str(tmp_path / "recorded")]
    assert set(found.config) == {"output"}
