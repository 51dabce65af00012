"""`mome report`: a campaign's page, written into the run's folder and logged where the run was tracked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.console import notify
from pipeline.config.errors import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.data.storage import join
from pipeline.reports.campaign import gather
from pipeline.reports.campaign_page import render_campaign
from pipeline.reports.comparison import compare
from pipeline.reports.run_folder import RunFolder, open_run
from pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)

CAMPAIGN = "campaign.html"


def report(
    run: str, out: Path | None = None, price: float | None = None, against: list[str] | None = None, track: bool = True
) -> dict[str, Any]:
    """Write the page of the run in folder `run` (path or URL) there, or to `out`. Returns what `--json` prints.

    The page is logged in MLflow unless the run goes on just now on this machine. Raises ConfigError, naming it, for a
    folder without a run.
    """
    opened = open_run(run)
    campaign = gather(opened, price)
    comparison = compare([opened, *map(open_run, against)]) if against else None
    page = render_campaign(campaign, comparison).encode()
    place = str(out) if out is not None else join(opened.folder, CAMPAIGN)
    opened.storage.write(place, page)
    if track and opened.run and not opened.is_live:  # the process that trains alone commits its journal
        _record(opened, page)
    return {
        "report": place,
        "status": campaign.status,
        "step": campaign.reached,
        "goodput": campaign.goodput,
        "restarts": campaign.restarts,
        "bad_samples": campaign.bad_samples,
        "alarms": [alarm.name for alarm in campaign.alarms if not alarm.is_over],
        "rank_hours": campaign.cost.rank_hours if campaign.cost else None,
        "cost": campaign.cost.total if campaign.cost and campaign.cost.price else None,
    }


@contextmanager
def reported(config: RunConfig) -> Iterator[None]:
    """Writes the page of the run that the block works on, however it ends. A fault of the page is told and no more."""
    begun = True
    try:
        yield
    except ConfigError:  # nothing was started, so there is nothing to tell
        begun = False
        raise
    finally:
        if begun:
            _write_after(config)


def _write_after(config: RunConfig) -> None:
    try:
        page = report(config.folder)["report"]
        notify(f"Campaign    {page}")
    except Exception as error:  # whatever it is, it must not hide how the run ended
        log.warning("no campaign report: %s: %s", type(error).__name__, error)


def _record(opened: RunFolder, page: bytes) -> None:
    tracker = Tracker.open(opened.config, opened.storage)
    tracker.artifact(CAMPAIGN, page)
    tracker.close()
