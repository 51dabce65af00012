"""Pages are self-contained and small, and render completely at any browser width."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.data.storage import Storage
from pipeline.evaluation.explain import Condition, ExplainedWord, Explanation, Guess, explanation_html
from pipeline.evaluation.report import render_report
from pipeline.evaluation.report_data import load_report_data, save_report_data
from pipeline.reports.comparison import compare, render_comparison
from pipeline.reports.run_folder import RunFolder, open_run
from pipeline.reports.run_report import RunReport, collect_report, render_run_report
from tests.support.bad_shards import Planted
from tests.support.chromium import Browser, browser, installed
from tests.support.full_report import fullest
from tests.support.recorded_run import record_run

MOST_BYTES = 5_000_000
TELEPHONE, DESK = 390, 1280
KINDS = ["evaluation", "run", "comparison", "explanation"]


@pytest.fixture(scope="module")
def pages(report: RunReport, run: RunFolder, runs: Path) -> dict[str, str]:
    """Return each kind of page with as much content as possible."""
    shown, beside = fullest(), compare([run, open_run(str(runs / "other"))])
    curves = {"vision": [(step, 1.0 / step) for step in range(1, 500)]}
    return {
        "evaluation": render_report(shown, run.config, curves, against=replace(shown, digest="e" * 64)),
        "run": render_run_report(replace(report, evaluations=[shown]), beside),
        "comparison": render_comparison(beside),
        "explanation": explanation_html(
            _explanation(), "unpronounceable" * 4, "s3://bucket/" + "run/" * 30, ["a note"]
        ),
    }


def _explanation() -> Explanation:
    heat = torch.arange(12.0).reshape(3, 4) / 66
    condition = Condition(
        (Guess("of-the-longest-kind", 0.5, True), Guess("b", 0.25, False), Guess("c", 0.2, False)), 0.5
    )
    words = [ExplainedWord(word, heat, condition, condition) for word in ("short", "incomprehensibilities", "a")]
    return Explanation(torch.zeros(24, 32, 3, dtype=torch.uint8), tuple(words), 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_single_small_files_without_scripts(pages: dict[str, str], kind: str) -> None:
    page = pages[kind]
    assert len(page.encode()) < MOST_BYTES
    assert not re.search(r"<script|@import|url\(|https?://|<link rel=.stylesheet", page)
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', page))


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    if installed() is None:
        pytest.skip("no Chromium here (apt-get install chromium): how pages look in a browser is not tested")
    with browser() as found:
        yield found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [TELEPHONE, DESK])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_render_in_a_browser_without_errors_or_overflow(
    pages: dict[str, str], opened: Browser, tmp_path: Path, kind: str, width: int, dark: bool
) -> None:
    path = tmp_path / f"{kind}.html"
    path.write_text(pages[kind], encoding="utf-8")
    everything = "document.querySelectorAll('details').forEach(each => each.open = true)"
    found = opened.open(path.as_uri(), width, dark, first=everything)
    assert found.faults == []
    assert found.requests == []
    assert found.width == width  # nothing sticks out of the page


def test_pages_show_no_password(planted: Planted, tmp_path: Path) -> None:
    for name, password in (("one", "secret-one"), ("two", "secret-two")):
        record_run(tmp_path, planted, name, f"sources.pairs.opt_out=http://user:{password}@server:5000")
    one, two = (open_run(str(tmp_path / name)) for name in ("one", "two"))
    for page in (
        render_run_report(collect_report(one)),
        render_comparison(compare([one, two])),
        render_report(fullest(), one.config, {}),
    ):
        assert "secret" not in page
    assert "server:5000" in render_run_report(collect_report(one))


def test_stored_report_data_is_read_back_unchanged(tmp_path: Path) -> None:
    older, newer = fullest(), replace(fullest(), stage="vision", at=fullest().at + 1)
    for shown in (newer, older):
        save_report_data(Storage(), str(tmp_path), shown)
    assert load_report_data(Storage(), str(tmp_path)) == [newer, older]
    (tmp_path / "evaluations" / "vision-pairs.json").write_text('{"name": "of another version"}')
    assert load_report_data(Storage(), str(tmp_path)) == [older]
