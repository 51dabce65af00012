"""The run report shows the curves, events, data, time, cost and quarantine of the run's folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError
from pipeline.data.contents.images import decode
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.pages.page import thumbnail
from pipeline.reports.run_folder import open_run
from pipeline.reports.run_report import (
    MAX_SAMPLES,
    THUMBNAIL,
    WIDE,
    _chart,
    collect_report,
    render_run_report,
)
from tests.support.recorded_run import ALERT, RESUMED_AT, SECONDS, SPIKE, STEPS, bad_records, record_run


def test_events_are_in_order_with_their_steps(report):
    assert [(event.kind, event.step) for event in report.events] == [
        ("begun", None),
        ("spike", STEPS),
        ("restart", RESUMED_AT),
        ("alert", 2 * STEPS),
        ("alert", 2 * STEPS),
        ("alert", 2 * STEPS),
        ("evaluation", 2 * STEPS),
        ("evaluation", 2 * STEPS),
    ]
    assert "failed: rank 1: killed" in report.events[2].text
    assert "pairs/i2t_r1 0.25" in report.events[6].text


def test_alerts_precede_everything_else_with_their_remedy(report):
    page = render_run_report(report)
    alerts = [(alert.name, alert.stage, alert.is_over) for alert in report.alerts]
    assert alerts == [("matching_collapsed", "pairs", False), ("starved", "pairs", True)]
    assert page.index(ALERT) < page.index("<h2>")
    assert SPIKE in page


@pytest.mark.parametrize("in_seconds", [False, True])
def test_every_point_is_drawn_and_no_line_crosses_a_restart(report, in_seconds):
    chart = _chart(report, WIDE, in_seconds)
    assert len(chart.bands) == 2
    assert {kind for _, kind, _ in chart.marks} == {"spike", "restart", "alert", "evaluation"}
    loss = chart.panels[0]
    lines = [[tuple(map(float, point.split(","))) for point in line.points.split()] for line in loss.lines]
    assert [len(line) for line in lines] == [STEPS, RESUMED_AT + 2 - STEPS, 2 * STEPS - RESUMED_AT - 2]
    points = [point for line in lines for point in line]
    assert all(chart.left <= x <= WIDE - chart.right and loss.top <= y <= loss.bottom for x, y in points)


def test_time_and_cost_add_up(report):
    total = sum(SECONDS.values())
    assert {time.phase: time.seconds for time in report.time} == SECONDS
    assert sum(time.fraction for time in report.time) == pytest.approx(1)
    assert report.run.goodput == SECONDS["training"] / total
    assert report.cost is not None
    assert report.cost.total == pytest.approx(4 * total / 3600 * 2.5)
    assert sum(time.cost for time in report.time) == pytest.approx(report.cost.total)


def test_the_configured_price_is_the_default(planted, tmp_path):
    record_run(tmp_path, planted, "priced", "cluster.price=3")
    cost = collect_report(open_run(str(tmp_path / "priced"))).cost
    assert cost is not None
    assert cost.price == 3


def test_bad_samples_show_their_image_or_an_error(report, planted):
    quarantine = report.quarantine
    assert quarantine.total == len(bad_records(planted))
    assert sum(samples for _, _, _, samples, _ in quarantine.by_reason) == len(planted.expected)
    assert max(times - samples for _, _, _, samples, times in quarantine.by_reason) == 1
    assert len(quarantine.samples) == MAX_SAMPLES
    for inspected in quarantine.samples:
        assert (inspected.image is None) == bool(inspected.error)
        if inspected.sample.reason in ("the truncated JPEG", "the PNG bomb", "the missing picture"):
            assert inspected.image is None
    shown = next(entry for entry in quarantine.samples if entry.sample.reason == "the missing caption")
    with Path(planted.folder, shown.sample.shard).open("rb") as shard:
        shard.seek(shown.sample.offset)
        data = shard.read(100_000)
    end = data.index(b"\xff\xd9") + 2
    assert shown.image == thumbnail(decode(data[:end], 10_000), THUMBNAIL)


def test_missing_and_changed_shards_are_reported(planted, tmp_path):
    moved = tmp_path / "pairs"
    shutil.copytree(planted.folder, moved)
    record_run(tmp_path, replace(planted, folder=str(moved)), "changed")
    for file in moved.glob("00000.tar*"):
        file.unlink()
    index_shards(Storage(), str(moved))
    changed = collect_report(open_run(str(tmp_path / "changed")))
    assert "have changed since" in changed.stages[1].sources[0].change
    shutil.rmtree(moved)
    gone = collect_report(open_run(str(tmp_path / "changed")))
    assert "cannot be read now" in gone.stages[1].sources[0].change
    assert all("not read again" in sample.error for sample in gone.quarantine.samples)
    assert "cannot be read now" in render_run_report(gone)


def test_a_run_that_never_started_has_a_report(planted, tmp_path):
    record_run(tmp_path, planted, "waiting")
    for part in ("journal", "time.json", "restarts", "quarantine"):
        place = tmp_path / "waiting" / part
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    waiting = collect_report(open_run(str(tmp_path / "waiting")))
    assert (waiting.status, waiting.run.reached, waiting.cost) == ("NOT STARTED", 0, None)
    assert "Nothing was recorded yet" in render_run_report(waiting)


def test_a_folder_without_a_run_is_rejected_by_name(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}: no run there"):
        open_run(str(tmp_path))


def test_stages_show_their_data_and_initial_weights(report):
    vision, pairs = report.stages
    assert (vision.start_from, pairs.start_from) == ("random", "stage vision")
    assert (vision.reached, pairs.reached) == (STEPS, STEPS)
    assert pairs.losses == {"itc": 5.0 / (2 * STEPS), "itm": 3.0 / (2 * STEPS)}
    source = pairs.sources[0]
    assert (source.num_samples, source.num_shards, source.change) == (120, 5, "")
    assert source.read == 8.0 * 2 * STEPS


def test_a_remote_run_is_read_from_its_committed_journal(run, s3_run):
    remote = open_run(s3_run)
    for name in ("stages", "sessions", "tags", "evaluations", "status"):
        assert getattr(remote, name) == getattr(run, name)
    assert remote.quarantined() == run.quarantined()
