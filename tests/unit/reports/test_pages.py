"""Pages are self-contained and small, and render completely at any browser width."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from pipeline.data.storage import Storage
from pipeline.evaluation.explain import Condition, ExplainedWord, Explanation, Guess, explanation_html
from pipeline.evaluation.report import render_report
from pipeline.evaluation.report_data import load_report_data, save_report_data
from pipeline.reports.comparison import compare, render_comparison
from pipeline.reports.run_folder import open_run
from pipeline.reports.run_report import collect_report, render_run_report
from tests.support.chromium import browser, installed
from tests.support.full_report import fullest
from tests.support.recorded_run import record_run

MAX_BYTES = 5_000_000
PHONE, DESKTOP = 390, 1280
KINDS = ["evaluation", "run", "comparison", "explanation"]


@pytest.fixture(scope="module")
def pages(report, run, runs):
    """Return each kind of page with as much content as possible."""
    data, comparison = fullest(), compare([run, open_run(str(runs / "other"))])
    curves = {"vision": [(step, 1.0 / step) for step in range(1, 500)]}
    heat = torch.arange(12.0).reshape(3, 4) / 66
    guesses = Guess("of-the-longest-kind", 0.5, True), Guess("b", 0.25, False), Guess("c", 0.2, False)
    condition = Condition(guesses, 0.5)
    words = [ExplainedWord(word, heat, condition, condition) for word in ("short", "incomprehensibilities", "a")]
    explanation = Explanation(torch.zeros(24, 32, 3, dtype=torch.uint8), tuple(words), 0.5)
    return {
        "evaluation": render_report(data, run.config, curves, against=replace(data, digest="e" * 64)),
        "run": render_run_report(replace(report, evaluations=[data]), comparison),
        "comparison": render_comparison(comparison),
        "explanation": explanation_html(explanation, "unpronounceable" * 4, "s3://bucket/" + "run/" * 30, ["a note"]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_single_small_files_without_scripts(pages, kind):
    page = pages[kind]
    assert len(page.encode()) < MAX_BYTES
    assert not re.search(r"<script|@import|url\(|https?://|<link rel=.stylesheet", page)
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]*)"', page))


@pytest.fixture(scope="module")
def chromium():
    if installed() is None:
        pytest.skip("no Chromium here (apt-get install chromium): how pages look in a browser is not tested")
    with browser() as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_render_in_a_browser_without_errors_or_overflow(pages, chromium, tmp_path, kind, width, dark):
    path = tmp_path / f"{kind}.html"
    path.write_text(pages[kind], encoding="utf-8")
    open_details = "document.querySelectorAll('details').forEach(details => details.open = true)"
    page = chromium.open(path.as_uri(), width, dark, first=open_details)
    assert (page.faults, page.requests) == ([], [])
    assert page.width == width  # nothing sticks out of the page


def test_pages_show_no_password(planted, tmp_path):
    for name, password in (("one", "secret-one"), ("two", "secret-two")):
        record_run(tmp_path, planted, name, f"sources.pairs.opt_out=http://user:{password}@server:5000")
    one, two = (open_run(str(tmp_path / name)) for name in ("one", "two"))
    page = render_run_report(collect_report(one))
    assert "server:5000" in page
    for shown in (page, render_comparison(compare([one, two])), render_report(fullest(), one.config, {})):
        assert "secret" not in shown


def test_stored_report_data_is_read_back_unchanged(tmp_path):
    older, newer = fullest(), replace(fullest(), stage="vision", at=fullest().at + 1)
    for data in (newer, older):
        save_report_data(Storage(), str(tmp_path), data)
    assert load_report_data(Storage(), str(tmp_path)) == [newer, older]
    (tmp_path / "evaluations" / "vision-pairs.json").write_text('{"name": "of another version"}')
    assert load_report_data(Storage(), str(tmp_path)) == [older]
