"""Reports of runs show what is in their folders, comparisons what differs, and every page renders completely."""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app, main
from pipeline.data.contents.images import decode
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage, join
from pipeline.evaluation.explain import Condition, ExplainedWord, Explanation, Guess, render_explanation
from pipeline.evaluation.report import render_report
from pipeline.pages.charts import Mark, Measure, Series, line_chart, significant
from pipeline.pages.page import thumbnail
from pipeline.reports import run_report
from pipeline.reports.run_folder import QUARANTINE, open_run
from pipeline.reports.run_report import collect_report, compare, render_comparison, render_run_report
from pipeline.tracking.journal import CommittedJournal, Journal
from tests.support.bad_shards import plant
from tests.support.full_report import fullest
from tests.support.recorded_run import ALERT, RESUMED_AT, SECONDS, SPIKE, STEPS, bad_records, record_run

WIDTHS = (390, 1280)  # of a phone and of a desktop
MEASURE = """<script>
onload = () => {
  const pages = [...document.querySelectorAll("iframe")].map(frame => frame.contentDocument);
  for (const page of pages) page.querySelectorAll("details").forEach(details => details.open = true);
  const fetched = page => page.defaultView.performance.getEntriesByType("resource").map(entry => entry.name);
  const requests = pages.flatMap(fetched).filter(name => !name.startsWith("data:"));
  document.title = JSON.stringify([pages.map(page => page.documentElement.scrollWidth), requests]);
};
</script>"""
VOID = {"meta", "link", "img", "br", "line", "circle", "polyline", "input", "rect", "path"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    planted = plant(tmp_path_factory.mktemp("planted") / "pairs")
    index_shards(Storage(), planted.folder)
    return planted


@pytest.fixture(scope="module")
def runs(tmp_path_factory, planted):
    """Record a run, and another that differs in three config keys."""
    folder, changes = tmp_path_factory.mktemp("runs"), ("seed=5", "stages.pairs.global_batch_size=16", "model.width=64")
    return record_run(folder, planted), record_run(folder, planted, "other", *changes)


@pytest.fixture(scope="module")
def report(runs):
    return collect_report(runs[0], price=2.5)


def test_report_has_events_in_order_alerts_first_time_cost_stages_and_sources(report, planted, tmp_path):
    ends = [("alert", 2 * STEPS)] * 3 + [("evaluation", 2 * STEPS)] * 2
    events = [("begun", None), ("spike", STEPS), ("restart", RESUMED_AT), *ends]
    assert [(event.kind, event.step) for event in report.events] == events
    assert "failed: rank 1: killed" in report.events[2].text
    assert "pairs: image → text R@1 25.0" in report.events[6].text
    assert report.verdict[0] == f"Finished: 2 of 2 stages, {2 * STEPS} steps."
    assert report.verdict[-1] == "1 open alert; 1 resolved."
    alerts = [(alert.key, alert.stage, alert.value.startswith("resolved at step 19")) for alert in report.alerts]
    assert alerts == [("mome.alert.matching_collapsed", "pairs", False), ("mome.alert.starved", "pairs", True)]
    total = sum(SECONDS.values())
    assert (report.time, report.run.goodput) == (SECONDS, SECONDS["training"] / total)
    assert report.cost.total == pytest.approx(4 * total / 3600 * 2.5)
    priced = collect_report(record_run(tmp_path, planted, "priced", "cluster.price=3"))
    assert priced.cost.price == 3, "the configured price is the default"
    stages = [(stage.start_from, stage.reached) for stage in report.stages]
    assert stages == [("random", STEPS), ("stage vision", STEPS)]
    assert report.stages[1].sources["pairs"][1:] == (5, 120, "")  # shards, samples, change
    page = render_run_report(report)
    assert page.index(ALERT) < page.index("<h2 ") < page.index("resolved at step 19")
    losses = f"itc {significant(5.0 / (2 * STEPS))}, itm {significant(3.0 / (2 * STEPS))}"
    shown = [SPIKE, losses, f'data-label="samples read">{8 * 2 * STEPS}<']
    assert [text for text in shown if text not in page] == []
    for in_seconds in (False, True):  # every point is drawn, and no line crosses a restart
        chart = run_report.draw_curves(report, run_report.WIDE, in_seconds)
        assert len(chart.bands) == 2
        assert {mark.kind for mark in chart.marks} == {"spike", "restart", "alert", "evaluation"}
        lengths = [len(points.split()) for _, points in chart.panels[0].lines]
        assert lengths == [STEPS, RESUMED_AT + 2 - STEPS, 2 * STEPS - RESUMED_AT - 2]


def test_bad_samples_show_their_image_or_an_error(report, planted):
    counts = [(samples, times) for *_, samples, times in report.quarantine_counts]
    assert [sum(column) for column in zip(*counts, strict=True)] == [len(planted.expected), len(bad_records(planted))]
    assert (max(times - samples for samples, times in counts), len(report.quarantine)) == (1, run_report.MAX_SAMPLES)
    for sample, image, error in report.quarantine:
        assert (image is None) == bool(error)
        assert image is None or sample.reason not in ("the truncated JPEG", "the PNG bomb", "the missing picture")
    sample, image, _ = next(entry for entry in report.quarantine if entry[0].reason == "the missing caption")
    data = Path(planted.folder, sample.shard).read_bytes()[sample.offset :]
    assert image == thumbnail(decode(data[: data.index(b"\xff\xd9") + 2], 10_000), run_report.THUMBNAIL)


def test_missing_and_changed_shards_and_a_run_that_never_started_are_reported(planted, tmp_path):
    moved = shutil.copytree(planted.folder, tmp_path / "pairs")
    run = record_run(tmp_path, replace(planted, folder=str(moved)), "changed")
    for file in moved.glob("00000.tar*"):
        file.unlink()
    index_shards(Storage(), str(moved))
    assert "have changed since" in collect_report(run).stages[1].sources["pairs"].change
    shutil.rmtree(moved)
    gone = collect_report(run)
    assert "cannot be read now" in gone.stages[1].sources["pairs"].change
    assert all("not read again" in error for _, _, error in gone.quarantine)
    assert "cannot be read now" in render_run_report(gone)
    (tmp_path / "waiting").mkdir()
    shutil.copy(tmp_path / "changed" / "run.json", tmp_path / "waiting")
    waiting = collect_report(open_run(f"{tmp_path}/waiting"))
    assert (waiting.status, waiting.run.reached, waiting.cost) == ("NOT STARTED", 0, None)
    assert "Nothing was recorded yet" in render_run_report(waiting)


@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_a_remote_run_is_read_from_its_committed_journal(report, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("MOME_CACHE", str(tmp_path))
    run, storage, url, own = report.run, Storage(s3.config), s3.url("recorded"), Path(report.run.folder)
    for path in own.rglob("*"):
        if path.is_file() and "journal" not in path.parts:
            storage.write(join(url, str(path.relative_to(own))), path.read_bytes())
    CommittedJournal(storage, url).commit(Journal(own / "journal"))
    remote = open_run(url, storage)
    for name in ("stages", "sessions", "tags", "evaluations", "status"):
        assert getattr(remote, name) == getattr(run, name)
    assert list(remote.records(*QUARANTINE)) == list(run.records(*QUARANTINE))


def test_only_changed_and_explicit_keys_differ_and_runs_of_equal_name_have_their_folders(runs, planted, tmp_path):
    values = {"seed": (0, 5), "model.width": (32, 64), "stages.pairs.global_batch_size": (8, 16)}
    comparison = compare(runs)
    assert comparison.config == {path: {"recorded": one, "other": two} for path, (one, two) in values.items()}
    assert all(len(set(values)) == 1 for rows in comparison.results.values() for values in rows.values())
    comparison = compare([runs[0], again := record_run(tmp_path, planted)])
    assert (comparison.runs, [*comparison.config]) == ([runs[0].folder, again.folder], ["output"])
    record_run(tmp_path, planted, "shorter")
    path, section = tmp_path / "shorter" / "run.json", "stages.vision"
    path.write_text(json.dumps((config := json.loads(path.read_text())) | {"stages": config["stages"][1:]}))
    shutil.rmtree(tmp_path / "shorter" / "journal")
    comparison = compare([runs[0], open_run(str(tmp_path / "shorter"))])
    assert comparison.config[section] == {"recorded": "4 keys"}, "of a stage that one run lacks"
    assert not [path for path in comparison.config if path.startswith(f"{section}.")]


def test_compare_prints_json_and_a_table_writes_a_page_and_needs_runs(runs, tmp_path, monkeypatch, capsys):
    page = tmp_path / "comparison.html"
    arguments = ["compare", *(run.folder for run in runs), "--html", str(page), "--json"]
    printed = json.loads(CliRunner().invoke(app, arguments).stdout.splitlines()[-1])
    results, goodput = printed["results"], SECONDS["training"] / sum(SECONDS.values())
    assert (printed["runs"], results["vision"]["recorded"] is None) == (["recorded", "other"], False)
    assert results["eval/pairs/i2t_r1"] == {"recorded": 0.5, "other": 0.5}
    assert (results["steps"]["other"], results["goodput"]["other"]) == (2 * STEPS, goodput)
    table = CliRunner().invoke(app, arguments[:3]).stdout
    assert table.index("image → text R@1") < table.index("stages.pairs.global_batch_size"), "results come first"
    assert re.search(r"image → text R@1 +50\.0\s%", table)
    assert all("stages.pairs.global_batch_size" in text for text in (page.read_text(), table))
    assert "model.layers" not in table
    for command in (["compare", runs[0].folder], ["report"]):
        monkeypatch.setattr("sys.argv", ["mome", *command, str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert f"{tmp_path}: no run there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pages(report, runs):
    """Return each kind of page with as much content as possible."""
    data, comparison = fullest(), compare(runs)
    against = replace(data, key=replace(data.key, digest="e" * 64))
    curves = {"vision": [(step, 1.0 / step) for step in range(1, 500)]}
    guesses = Guess("of-the-longest-kind", 0.5, True), Guess("b", 0.25, False), Guess("c", 0.2, False)
    heat, condition = torch.arange(12.0).reshape(3, 4) / 66, Condition(guesses, 0.5)
    words = (ExplainedWord(word, heat, condition, condition) for word in ("short", "incomprehensibilities", "a"))
    explanation = Explanation(torch.zeros(24, 32, 3, dtype=torch.uint8), tuple(words), 0.5)
    about = "unpronounceable" * 4, "s3://bucket/" + "run/" * 30, ["a note"]
    return {
        "evaluation": render_report(data, report.run.config, curves, against=against),
        "run": render_run_report(replace(report, evaluations=[data]), comparison),
        "comparison": render_comparison(comparison),
        "explanation": render_explanation(explanation, *about, ".html").decode(),
    }


class Page(HTMLParser):
    """Parser that collects addresses, and checks that tags are closed in the correct order."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.open += [tag] * (tag not in VOID)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag  # <line/>


def test_pages_are_single_small_files_without_scripts_or_passwords(pages, planted, tmp_path):
    for kind, page in pages.items():
        assert len(page.encode()) < 5_000_000, kind
        assert not re.search(r"<script|@import|url\(|https?://", page), kind
        parsed = Page(page)
        outside = {uri for uri in parsed.addresses if not uri.startswith("data:")} - {"evaluation.html"}
        assert (parsed.open, [uri for uri in outside if not uri.startswith("#")]) == ([], []), kind
        assert [uri for uri in outside if f'id="{uri[1:]}"' not in page] == [], kind
    assert "&lt;script&gt;" in pages["evaluation"]
    opt_out = "sources.pairs.opt_out=http://user:secret-{}@server:5000"
    one, two = (record_run(tmp_path, planted, name, opt_out.format(name)) for name in ("one", "two"))
    page = render_run_report(collect_report(one))
    assert "server:5000" in page
    for shown in (page, render_comparison(compare([one, two])), render_report(fullest(), one.config, {})):
        assert "secret" not in shown


def test_pages_render_in_a_browser_without_errors_or_overflow(pages, tmp_path):
    """Each page is laid out in a frame as wide as a phone, and in one as wide as a desktop, with all details open."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here (apt-get install chromium): how pages look in a browser is not tested")
    frames = tmp_path / "frames.html"
    for kind, page in pages.items():
        (tmp_path / f"{kind}.html").write_text(page, encoding="utf-8")
    sources = [f'src="{kind}.html" width="{width}"' for kind in pages for width in WIDTHS]
    frames.write_text("".join(f'<iframe {s} height="900" style="border: 0"></iframe>' for s in sources) + MEASURE)
    options = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += [f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr", "--dump-dom", frames.as_uri()]
    for scheme in ("0", "1"):  # dark, light
        command = [browser, "--headless", f"--blink-settings=preferredColorScheme={scheme}", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert "CONSOLE" not in done.stderr
        measured = html.unescape(re.search("<title>(.*)</title>", done.stdout)[1])
        assert json.loads(measured) == [[*WIDTHS] * len(pages), []]


def chart(values, in_seconds=False, unit=1.0):
    """Return a chart, its only panel, and the points of the panel's lines."""
    points, last = [(unit * number, value) for number, value in enumerate(values)], unit * max(len(values) - 1, 0)
    measure, mark = Measure("loss", [Series(0, points)] if values else []), Mark(last, "restart", "")
    drawn = line_chart([measure], run_report.NARROW, [("a_stage", 0.0, last)], [mark], in_seconds)
    (panel,) = drawn.panels
    return drawn, panel, [tuple(map(float, point.split(","))) for _, line in panel.lines for point in line.split()]


def test_charts_stay_inside_their_frame_with_logarithmic_axes_over_decades_and_a_fitting_unit_of_time():
    for values in (
        [], [1.0], [2.0, 2.0], [0.0, 0.0], [9.3, 4.1, 3.9], [1e-7, 3e-7], [1e-6, 1e3], [0.0, 5.0], [-2.0, 5.0],
        [-1.0, 1e9], [1e9, 3.0], [math.nan, 1.0, 3.0], [math.nan, math.inf], list(map(float, range(5000))),
    ):  # fmt: skip
        drawn, panel, points = chart(values)
        ((x, width, _),), right = drawn.bands, run_report.NARROW - drawn.right
        points += [dot[1:] for dot in panel.dots]
        assert len(points) == min(sum(map(math.isfinite, values)), 400) or len(values) > 400 >= len(points) > 200
        assert all(drawn.left <= x <= right and panel.top <= y <= panel.bottom for x, y in points), values
        assert 2 <= len(panel.ticks) == len({label for _, label in panel.ticks}) <= 7
        assert all(panel.top <= y <= panel.bottom for y, _ in panel.ticks)
        assert all(drawn.left <= at <= right for at, *_ in [*drawn.ticks, *drawn.marks])
        assert (x + width <= right + 0.1, panel.bottom < drawn.height) == (True, True)
    _, panel, points = chart([1000.0, 100.0, 10.0, 1.0])
    steps = [after - before for (_, before), (_, after) in itertools.pairwise(points)]
    assert steps == pytest.approx([30.0] * 3, abs=0.2), "lower values are drawn lower"
    assert [panel.is_logarithmic, chart([3.0, 2.0, 1.0])[1].is_logarithmic] == [True, False]
    for unit, name in ((10.0, "s"), (600.0, "min"), (20_000.0, "h"), (100_000.0, "d")):
        labels = [label for _, label in chart([1.0] * 8, in_seconds=True, unit=unit)[0].ticks]
        assert (2 <= len(labels) <= 7, {label.split()[1] for label in labels}) == (True, {name})
