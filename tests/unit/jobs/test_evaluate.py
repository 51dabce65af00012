"""`mome evaluate` names results by their data, and neither replaces nor compares results of different data."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from jobs.caller import URI_VARIABLE
from jobs.cli import app
from pipeline.config.errors import ConfigError, MomeError
from pipeline.data.storage import Storage
from pipeline.evaluation.report_data import headline, load_report_data
from tests.support.finished_run import config_of, draw, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return two folders of shards that have the same name."""
    folder = tmp_path_factory.mktemp("drawn")
    return {"own": draw(folder / "test"), "other": draw(folder / "else" / "test", seed=1)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, config_of(folder.parent, {"test": {"shards": data["own"]}}, "test"), data["own"], run=None)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    return Path(shutil.copytree(made, tmp_path / "run"))


def evaluate(run: Path, *options: str) -> dict[str, Any]:
    told = CliRunner().invoke(app, ["evaluate", str(run), "--rerank", "0", *options, "--json"])
    if told.exception is not None:
        raise told.exception
    result: dict[str, Any] = json.loads(told.stdout.splitlines()[-1])
    return result


def test_each_evaluation_has_its_own_name_report_and_metrics(run: Path, data: dict[str, str]) -> None:
    whole = evaluate(run)
    first = evaluate(run, "--limit", "6")
    other = evaluate(run, "--source", data["other"])
    named = evaluate(run, "--source", data["other"], "--as", "hard")
    digest = other["source_digest"][:8]
    results = [whole, first, other, named]
    assert [each["source"] for each in results] == ["test", "test-first-6", f"test-{digest}", "hard"]
    assert len({each["report"] for each in results}) == 4
    assert all(Path(each["report"]).exists() for each in results)
    found = load_report_data(Storage(), str(run))
    assert {each.source: each.pairs for each in found} == {each["source"]: each["pairs"] for each in results}
    assert headline(found).source == "test"  # although the other three are newer
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(f'href="{Path(each["report"]).name}"' in page for each in results)
    again = evaluate(run)
    assert again == whole
    assert len(load_report_data(Storage(), str(run))) == 4


def test_name_of_other_data_is_rejected_before_evaluation(run: Path, data: dict[str, str]) -> None:
    evaluate(run, "--as", "mine")
    before = (run / "report-mine.html").read_bytes()
    for options in (("--limit", "6"), ("--source", data["other"])):
        with pytest.raises(ConfigError, match="--as mine"):
            evaluate(run, "--as", "mine", *options)
    for name in ("test", "../outside", "a b", ""):
        with pytest.raises(ConfigError, match="--as"):
            evaluate(run, "--source", data["other"], "--as", name)
    assert (run / "report-mine.html").read_bytes() == before


def test_metrics_of_different_data_are_not_compared(
    run: Path, made: Path, data: dict[str, str], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(made, tmp_path / "other"))
    with pytest.raises(ConfigError, match="never evaluated"):
        evaluate(run, "--against", str(other))
    evaluate(other, "--source", data["other"])
    evaluate(other, "--limit", "6")
    with pytest.raises(ConfigError, match="not evaluated on the same data"):
        evaluate(run, "--against", str(other))
    compared = evaluate(run, "--limit", "6", "--against", str(other))["report"]
    assert "Compared with other" in Path(compared).read_text("utf-8")
    evaluate(run)
    told = CliRunner().invoke(app, ["compare", str(run), str(other), "--json"])
    rows = json.loads(told.stdout.splitlines()[-1])["results"]
    figures = {name: values for name, values in rows.items() if name.startswith("eval/")}
    whole = {name: values for name, values in figures.items() if name.startswith("eval/test/")}
    assert whole
    assert all(values[str(other)] is None for values in whole.values())
    common = {name: values for name, values in figures.items() if name.startswith("eval/test-first-6/")}
    assert common
    assert all(None not in values.values() for values in common.values())


def test_long_names_are_cut_or_rejected_and_links_resolve(run: Path, data: dict[str, str], tmp_path: Path) -> None:
    long, odd = (Path(shutil.copytree(data["other"], tmp_path / name)) for name in (250 * "x", "100% #1?"))
    assert Path(evaluate(run, "--source", str(long))["report"]).exists()
    with pytest.raises(ConfigError, match="--as"):
        evaluate(run, "--as", 101 * "a")
    evaluate(run, "--source", str(odd))
    page = (run / "report.html").read_text(encoding="utf-8")
    links = [unquote(link) for link in re.findall(r'<a href="([^"]*)"', page)]
    assert len(links) == 2
    assert all((run / link).is_file() for link in links)


@pytest.mark.parametrize("content", [b"my notes", b"<!doctype html><title>another page</title>"])
def test_file_not_written_by_mome_is_not_replaced(
    run: Path, data: dict[str, str], tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text((run / "run.json").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr("jobs.evaluate._evaluate", None)  # fails if the evaluation starts
    page = tmp_path / "page.html"
    page.write_bytes(content)
    for arguments in (
        ["evaluate", str(run), "--report", str(page)],
        ["report", str(run), "--out", str(page)],
        ["compare", str(run), str(run), "--html", str(page)],
        ["plan", str(tmp_path / "run.yaml"), "--scaling", str(page)],
        ["shards", "show", data["own"], "--sheet", str(page)],
        ["shards", "check", data["own"], "--workers", "1", "--report", str(page)],
    ):
        told = CliRunner().invoke(app, arguments)
        assert isinstance(told.exception, ConfigError), told.output
    assert page.read_bytes() == content


def test_page_replaces_only_a_page_of_its_kind(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        assert CliRunner().invoke(app, ["report", str(run), "--out", str(page)]).exit_code == 0
    with pytest.raises(ConfigError, match="something else"):
        evaluate(run, "--report", str(page))


def test_image_replaces_only_an_image_of_its_kind(run: Path, data: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text((run / "run.json").read_text(encoding="utf-8"), encoding="utf-8")
    sheet, curve = str(tmp_path / "sheet.png"), str(tmp_path / "curve.svg")
    own = (["shards", "show", data["own"], "--sheet", sheet], ["plan", str(tmp_path / "run.yaml"), "--scaling", curve])
    other = (["shards", "show", data["other"], "--sheet", sheet], [*own[1], "--network", "nvlink"])
    for command in (*own, *own):
        told = CliRunner().invoke(app, command)
        assert told.exit_code == 0, told.output
    for command in other:
        assert isinstance(CliRunner().invoke(app, command).exception, ConfigError)


@pytest.mark.parametrize("place", ["folder", "file/bad.jsonl"])
def test_findings_are_written_completely_or_not_at_all(data: dict[str, str], tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    check = ["shards", "check", data["own"], "--workers", "1", "--report"]
    assert isinstance(CliRunner().invoke(app, [*check, str(tmp_path / place)]).exception, ConfigError)
    earlier = '{"shard": "0.tar", "key": "a", "offset": 0, "stage": "image", "reason": "cut"}\n'
    (tmp_path / "bad.jsonl").write_text(earlier, encoding="utf-8")
    wrong = CliRunner().invoke(
        app, ["shards", "check", str(tmp_path / "none"), "--report", str(tmp_path / "bad.jsonl")]
    )
    assert isinstance(wrong.exception, MomeError)
    assert (tmp_path / "bad.jsonl").read_text(encoding="utf-8") == earlier  # a failed check does not replace the file
    assert CliRunner().invoke(app, [*check, str(tmp_path / "bad.jsonl")]).exit_code == 0
    assert (tmp_path / "bad.jsonl").read_bytes() == b""
    assert CliRunner().invoke(app, [*check, "/dev/null"]).exit_code == 0


def test_embeddings_do_not_replace_those_of_another_source(run: Path, data: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "vectors"
    embed = ["--checkpoint", str(run), "--out", str(out), "--json"]
    first = CliRunner().invoke(app, ["embed", data["own"], *embed])
    assert first.exit_code == 0, first.output
    before = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    refused = CliRunner().invoke(app, ["embed", data["other"], *embed])
    assert isinstance(refused.exception, ConfigError)
    (out / "_source.json").unlink()  # earlier versions did not write this file
    assert isinstance(CliRunner().invoke(app, ["embed", data["other"], *embed]).exception, ConfigError)
    assert {path.name: path.read_bytes() for path in out.glob("*.parquet")} == before
    again = CliRunner().invoke(app, ["embed", data["own"], *embed])
    assert json.loads(again.stdout.splitlines()[-1])["already_done"] == len(before)


def test_export_replaces_only_its_own_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    export = ["export", str(run), "--format", "safetensors", "--out", str(out)]
    for _ in range(6):  # replacing an identical export is allowed
        assert CliRunner().invoke(app, export).exit_code == 0
    out.write_bytes(b"somebody's weights")
    assert isinstance(CliRunner().invoke(app, export).exception, ConfigError)
    assert out.read_bytes() == b"somebody's weights"
