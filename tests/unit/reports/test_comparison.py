"""`mome compare` shows exactly the config keys that differ and the results of every run."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jobs.cli import app, main
from pipeline.reports.comparison import compare
from pipeline.reports.run_folder import open_run
from tests.support.recorded_run import SECONDS, STEPS, record_run


def test_exactly_the_changed_keys_differ(runs):
    comparison = compare([open_run(str(runs / "recorded")), open_run(str(runs / "other"))])
    assert comparison.config == {
        "seed": {"recorded": 0, "other": 5},
        "model.width": {"recorded": 32, "other": 64},
        "stages.pairs.global_batch_size": {"recorded": 8, "other": 16},
    }
    differing = {row.name for rows in comparison.results.values() for row in rows if row.differs}
    assert differing == set()


def test_a_missing_stage_shows_only_its_explicit_keys(runs, planted, tmp_path):
    record_run(tmp_path, planted, "shorter")
    path = tmp_path / "shorter" / "run.json"
    config = json.loads(path.read_text())
    config["stages"] = config["stages"][1:]
    path.write_text(json.dumps(config))
    for session in (tmp_path / "shorter" / "journal").glob("*.jsonl"):
        session.unlink()
    comparison = compare([open_run(str(runs / "recorded")), open_run(str(tmp_path / "shorter"))])
    prefix = "stages.vision."
    own = {path.removeprefix(prefix) for path in comparison.config if path.startswith(prefix)}
    assert own == {"sources.pictures", "steps", "global_batch_size", "max_text_length"}
    assert all(
        "shorter" not in values for path, values in comparison.config.items() if path.startswith("stages.vision.")
    )


def test_compare_prints_json_and_writes_a_page(runs, tmp_path):
    page = tmp_path / "comparison.html"
    arguments = ["compare", str(runs / "recorded"), str(runs / "other"), "--html", str(page), "--json"]
    printed = json.loads(CliRunner().invoke(app, arguments).stdout.splitlines()[-1])
    assert printed["runs"] == ["recorded", "other"]
    assert printed["results"]["vision"]["recorded"] is not None
    assert printed["results"]["eval/pairs/i2t_r1"] == {"recorded": 0.5, "other": 0.5}
    assert printed["results"]["steps"]["other"] == 2 * STEPS
    assert printed["results"]["goodput"]["other"] == SECONDS["training"] / sum(SECONDS.values())
    assert "stages.pairs.global_batch_size" in page.read_text()
    table = CliRunner().invoke(app, arguments[:3]).stdout
    assert "stages.pairs.global_batch_size" in table
    assert "model.layers" not in table


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_folder_without_a_run_exits_with_status_2(command, runs, tmp_path, monkeypatch, capsys):
    others = [str(runs / "recorded")] if command == "compare" else []
    monkeypatch.setattr("sys.argv", ["mome", command, *others, str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"{tmp_path}: no run there" in capsys.readouterr().err


def test_runs_of_equal_name_are_identified_by_folder(runs, planted, tmp_path):
    record_run(tmp_path, planted)
    comparison = compare([open_run(str(runs / "recorded")), open_run(str(tmp_path / "recorded"))])
    assert comparison.runs == [str(runs / "recorded"), str(tmp_path / "recorded")]
    assert set(comparison.config) == {"output"}
