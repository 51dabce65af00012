"""`mome evaluate` names results by their data, and neither replaces nor compares results of different data."""

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import mome as api
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.configs import URI_VARIABLE
from jobs.evaluate import stored_evaluation
from pipeline.config.errors import ConfigError, MomeError
from pipeline.data.storage import Storage
from pipeline.evaluation.report import headline, load_report_data
from pipeline.reports.run_folder import open_run
from tests.support.finished_run import config_of, draw, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return two folders of shards that have the same name."""
    folder = tmp_path_factory.mktemp("drawn")
    return {"own": draw(folder / "test"), "other": draw(folder / "else" / "test", seed=1)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = config_of(folder.parent, {"test": {"shards": data["own"]}}, "test")
    return Path(write_run(folder, config, data["own"], run=None))


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """Return a copy of the finished run, whose config is also in `run.yaml` next to it."""
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    shutil.copy(finished / "run.json", tmp_path / "run.yaml")
    return Path(shutil.copytree(finished, tmp_path / "run"))


def mome(*arguments):
    """Run a command and return its last line of output; raise its exception."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return (done.stdout.splitlines() or [""])[-1]


def evaluate(run, *options):
    return json.loads(mome("evaluate", run, "--rerank", "0", *options, "--json"))


def test_api_evaluates_as_the_command_does_and_the_result_of_a_finished_run_is_kept(run, data):
    config = open_run(str(run), Storage()).config
    config = config.model_copy(update={"output": str(run.parent), "name": run.name})
    assert stored_evaluation(config) is None
    result = api.evaluate(run, limit=6)
    assert result == json.loads(mome("evaluate", run, "--limit", "6", "--json"))
    assert stored_evaluation(config) is None, "of a part of the data"
    whole = api.evaluate(run)
    assert stored_evaluation(config) == whole != result
    sources = {"test": config.sources["test"].model_copy(update={"shards": data["other"]})}
    assert stored_evaluation(config.model_copy(update={"sources": sources})) is None, "of other data"


def test_each_evaluation_has_its_own_name_report_and_metrics(run, data, tmp_path):
    whole, first = evaluate(run), evaluate(run, "--limit", "6")
    other = evaluate(run, "--source", data["other"])
    results = [whole, first, other, evaluate(run, "--source", data["other"], "--as", "hard")]
    names = ["test", "test-first-6", f"test-{other['source_digest'][:8]}", "hard"]
    reports = {Path(result["report"]) for result in results}
    assert ([result["source"] for result in results], [r.exists() for r in reports]) == (names, [True] * 4)
    stored = load_report_data(Storage(), str(run))
    assert {data.key.name: data.pairs for data in stored} == {result["source"]: result["pairs"] for result in results}
    assert headline(stored).key.name == "test"  # although the other three are newer
    page = (run / "evaluation.html").read_text(encoding="utf-8")
    assert all(f'href="{report.name}"' in page for report in reports)
    assert evaluate(run) == whole
    assert len(load_report_data(Storage(), str(run))) == 4
    before = (run / "evaluation-hard.html").read_bytes()
    with pytest.raises(ConfigError, match="--as hard"):
        evaluate(run, "--as", "hard")
    for name in ("test", "../outside", "a b", "", 101 * "a"):
        with pytest.raises(ConfigError, match="--as"):
            evaluate(run, "--source", data["other"], "--as", name)
    assert (run / "evaluation-hard.html").read_bytes() == before
    long, odd = (shutil.copytree(data["other"], tmp_path / name) for name in (250 * "x", "100% #1?"))
    assert Path(evaluate(run, "--source", long)["report"]).exists()
    evaluate(run, "--source", odd)
    page = (run / "evaluation.html").read_text(encoding="utf-8")
    links = {unquote(link) for link in re.findall(r'<a href="([^"#]+)"', page)}
    assert "run_report.html" in links  # which `mome train` writes at its end
    links.remove("run_report.html")
    assert [(run / link).is_file() for link in links] == [True] * 6


def test_metrics_of_different_data_are_not_compared(run, finished, data, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    with pytest.raises(ConfigError, match="never evaluated"):
        evaluate(run, "--against", other)
    evaluate(other, "--source", data["other"])
    evaluate(other, "--limit", "6")
    with pytest.raises(ConfigError, match="not evaluated on the same data"):
        evaluate(run, "--against", other)
    compared = evaluate(run, "--limit", "6", "--against", other)["report"]
    assert "Compared with other" in Path(compared).read_text("utf-8")
    evaluate(run)
    rows = json.loads(mome("compare", run, other, "--json"))["results"]
    whole = [values[str(other)] for name, values in rows.items() if name.startswith("eval/test/")]
    common = [value for name, own in rows.items() if name.startswith("eval/test-first-6/") for value in own.values()]
    assert (set(whole), None in common, len(common) > 0) == ({None}, False, True)


def test_outputs_replace_only_an_older_version_of_themselves(run, data, tmp_path, monkeypatch):
    page, sheet, curve, weights = (tmp_path / name for name in ("a.html", "sheet.png", "curve.svg", "w.safetensors"))
    show, plan = ["shards", "show", data["own"], "--sheet"], ["plan", tmp_path / "run.yaml", "--scaling"]
    export = ["export", run, "--format", "safetensors", "--out", weights]
    for command in 2 * (["report", run, "--out", page], [*show, sheet], [*plan, curve], export):
        mome(*command)  # equal exports have equal bytes, and replacing one is allowed
    with pytest.raises(ConfigError, match="something else"):
        evaluate(run, "--report", page)
    for other in (["shards", "show", data["other"], "--sheet", sheet], [*plan, curve, "--network", "nvlink"]):
        with pytest.raises(ConfigError):
            mome(*other)
    monkeypatch.setattr("jobs.evaluate._evaluate", None)  # fails if the evaluation starts
    check = ["shards", "check", data["own"], "--workers", "1", "--report"]
    for content in (b"my notes", b"<!doctype html><title>another page</title>"):
        for file in (page, weights):
            file.write_bytes(content)
        reports = ["evaluate", run, "--report"], ["report", run, "--out"], ["compare", run, run, "--html"]
        for command in (*([*command, page] for command in (*reports, plan, show, check)), export):
            with pytest.raises(ConfigError):
                mome(*command)
        assert page.read_bytes() == weights.read_bytes() == content


def test_findings_are_written_completely_or_not_at_all(data, tmp_path):
    check, bad = ["shards", "check", data["own"], "--workers", "1", "--report"], tmp_path / "bad.jsonl"
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for place in (tmp_path, tmp_path / "file" / "bad.jsonl"):
        with pytest.raises(ConfigError):
            mome(*check, place)
    earlier = '{"shard": "0.tar", "key": "a", "offset": 0, "stage": "image", "reason": "cut"}\n'
    bad.write_text(earlier, encoding="utf-8")
    with pytest.raises(MomeError):
        mome("shards", "check", tmp_path / "none", "--report", bad)
    assert bad.read_text(encoding="utf-8") == earlier  # a failed check does not replace the file
    mome(*check, bad)
    assert bad.read_bytes() == b""
    mome(*check, "/dev/null")
