"""A campaign's report tells what its run's folder holds: curves, events, data, time, cost, and bad samples again."""

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
from pipeline.reports.bad_samples import PICTURES, SIDE
from pipeline.reports.run_folder import RunFolder, open_run
from pipeline.reports.run_report import WIDE, RunReport, _stretches, _timeline, collect_report, render_run_report
from tests.support.bad_shards import Planted
from tests.support.recorded_run import ALERT, RESUMED_AT, SECONDS, SPIKE, STEPS, bad_records, record_run


def test_what_happened_stands_in_its_order_with_its_steps(campaign: RunReport) -> None:
    told = [(event.kind, event.step) for event in campaign.events]
    assert told == [
        ("begun", None),
        ("spike", STEPS),
        ("restart", RESUMED_AT),
        ("alert", 2 * STEPS),
        ("alert", 2 * STEPS),
        ("alert", 2 * STEPS),
        ("evaluation", 2 * STEPS),
        ("evaluation", 2 * STEPS),
    ]
    assert "failed: rank 1: killed" in campaign.events[2].told
    assert "pairs/i2t_r1 0.25" in campaign.events[6].told


def test_an_alert_stands_before_everything_else_with_what_to_do(campaign: RunReport) -> None:
    page = render_run_report(campaign)
    told = [(alert.name, alert.stage, alert.is_over) for alert in campaign.alerts]
    assert told == [("matching_collapsed", "pairs", False), ("starved", "pairs", True)]
    assert page.index(ALERT) < page.index("<h2>")
    assert SPIKE in page


@pytest.mark.parametrize("in_seconds", [False, True])
def test_every_point_is_drawn_and_no_line_crosses_a_restart(campaign: RunReport, in_seconds: bool) -> None:
    stretches = list(_stretches(campaign, "train/loss", in_seconds))
    assert [len(each.points) for each in stretches] == [STEPS, RESUMED_AT + 2 - STEPS, 2 * STEPS - RESUMED_AT - 2]
    drawn = _timeline(campaign, WIDE, in_seconds)
    assert len(drawn.bands) == 2
    assert {kind for _, kind, _ in drawn.marks} == {"spike", "restart", "alert", "evaluation"}
    loss = drawn.panels[0]
    spots = [tuple(map(float, spot.split(","))) for line in loss.lines for spot in line.points.split()]
    assert len(spots) == 2 * STEPS
    assert all(drawn.left <= x <= WIDE - drawn.right and loss.top <= y <= loss.bottom for x, y in spots)


def test_time_and_cost_are_whole(campaign: RunReport) -> None:
    total = sum(SECONDS.values())
    assert {each.kind: each.seconds for each in campaign.time} == SECONDS
    assert sum(each.share for each in campaign.time) == pytest.approx(1)
    assert campaign.goodput == SECONDS["training"] / total
    assert campaign.cost is not None
    assert campaign.cost.total == pytest.approx(4 * total / 3600 * 2.5)
    assert sum(each.cost for each in campaign.time) == pytest.approx(campaign.cost.total)


def test_the_price_of_the_config_holds_where_none_is_given(planted: Planted, tmp_path: Path) -> None:
    record_run(tmp_path, planted, "priced", "cluster.price=3")
    cost = collect_report(open_run(str(tmp_path / "priced"))).cost
    assert cost is not None
    assert cost.price == 3


def test_bad_samples_are_shown_where_they_decode_and_else_say_why(campaign: RunReport, planted: Planted) -> None:
    quarantine = campaign.quarantine
    assert quarantine.total == len(bad_records(planted))
    assert sum(samples for _, _, _, samples, _ in quarantine.by_reason) == len(planted.expected)
    assert max(times - samples for _, _, _, samples, times in quarantine.by_reason) == 1
    assert len(quarantine.samples) == PICTURES
    for each in quarantine.samples:
        assert (each.picture is None) == bool(each.why)
        if each.fault.reason in ("the truncated JPEG", "the PNG bomb", "the missing picture"):
            assert each.picture is None
    shown = next(each for each in quarantine.samples if each.fault.reason == "the missing caption")
    with Path(planted.folder, shown.fault.shard).open("rb") as shard:
        shard.seek(shown.fault.offset)
        data = shard.read(100_000)
    end = data.index(b"\xff\xd9") + 2
    assert shown.picture == thumbnail(decode(data[:end], 10_000), SIDE)


def test_shards_that_are_gone_or_others_are_told(planted: Planted, tmp_path: Path) -> None:
    moved = tmp_path / "pairs"
    shutil.copytree(planted.folder, moved)
    record_run(tmp_path, replace(planted, folder=str(moved)), "changed")
    for file in moved.glob("00000.tar*"):
        file.unlink()
    index_shards(Storage(), str(moved))
    changed = collect_report(open_run(str(tmp_path / "changed")))
    assert "others now" in changed.stages[1].sources[0].now
    shutil.rmtree(moved)
    gone = collect_report(open_run(str(tmp_path / "changed")))
    assert "cannot be read now" in gone.stages[1].sources[0].now
    assert all("not read again" in each.why for each in gone.quarantine.samples)
    assert "cannot be read now" in render_run_report(gone)


def test_a_run_that_never_started_has_a_page_too(planted: Planted, tmp_path: Path) -> None:
    record_run(tmp_path, planted, "waiting")
    for part in ("journal", "time.json", "restarts", "quarantine"):
        place = tmp_path / "waiting" / part
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    waiting = collect_report(open_run(str(tmp_path / "waiting")))
    assert (waiting.status, waiting.reached, waiting.cost) == ("NOT STARTED", 0, None)
    assert "Nothing was recorded yet" in render_run_report(waiting)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: no run there"):
        open_run(str(tmp_path))


def test_stages_tell_what_they_read_and_where_they_began(campaign: RunReport) -> None:
    vision, pairs = campaign.stages
    assert (vision.start_from, pairs.start_from) == ("random", "stage vision")
    assert (vision.reached, pairs.reached) == (STEPS, STEPS)
    assert pairs.losses == {"itc": 5.0 / (2 * STEPS), "itm": 3.0 / (2 * STEPS)}
    source = pairs.sources[0]
    assert (source.num_samples, source.num_shards, source.now) == (120, 5, "")
    assert source.read == 8.0 * 2 * STEPS


def test_of_a_remote_folder_the_committed_journal_is_read(run: RunFolder, s3_run: str) -> None:
    remote = open_run(s3_run)
    assert (remote.stages, remote.sessions, remote.tags, remote.evaluations, remote.status) == (
        run.stages,
        run.sessions,
        run.tags,
        run.evaluations,
        run.status,
    )
    assert remote.quarantined() == run.quarantined()
