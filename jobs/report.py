"""`mome report`: a campaign's page, written into the run's folder and logged where the run was tracked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.caller import Caller, untracked_because
from jobs.console import notify
from jobs.output import write_output
from pipeline.config.errors import ConfigError
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage, join
from pipeline.reports.comparison import compare
from pipeline.reports.run_folder import open_run
from pipeline.reports.run_report import collect_report, render_run_report
from pipeline.tracking.locations import configured_uri, tracking_uri
from pipeline.tracking.tracker import JournalTracker
from pipeline.training.prepare import RUN_FILE

log = logging.getLogger(__name__)

RUN_REPORT = "run_report.html"


def report(
    run: str,
    out: Path | None = None,
    price: float | None = None,
    against: list[str] | None = None,
    track: bool | None = None,
    caller: Caller = Caller(),
) -> dict[str, Any]:
    """Write the page of the run in folder `run` (path or URL) there, or to `out`. Returns what `--json` prints.

    With `track` the page is logged in MLflow, if the run does not go on just now on this machine; if it is None, where
    `untracked_because` finds nothing against it. Raises ConfigError, naming it, for a folder without a run.
    """
    opened = open_run(run, caller.store())
    config = caller.applied(opened.config)
    collected = collect_report(opened, price, None if config.tracking.uri is None else tracking_uri(config))
    comparison = compare([opened, *(open_run(each, opened.storage) for each in against)]) if against else None
    page = render_run_report(collected, comparison).encode()
    place = str(out) if out is not None else join(opened.folder, RUN_REPORT)
    if out is None:
        opened.storage.write(place, page)
    else:
        write_output(opened.storage, place, page, "--out")
    if opened.run and not opened.is_live:  # the process that trains alone commits its journal
        reason = untracked_because(config, opened.recorded, opened.storage) if track is None else None
        if reason is not None:
            notify(f"the page is not logged in MLflow: {reason}. --track logs it in {redact(configured_uri(config))}")
        elif track is not False:
            _record(config, opened.storage, page)
    return {
        "report": place,
        "status": collected.status,
        "step": opened.reached,
        "goodput": opened.goodput,
        "restarts": opened.num_restarts,
        "bad_samples": collected.bad_samples,
        "alerts": [alert.name for alert in collected.alerts if not alert.is_over],
        "rank_hours": collected.cost.rank_hours if collected.cost else None,
        "cost": collected.cost.total if collected.cost and collected.cost.price else None,
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
    caller = Caller.of(config)
    try:
        if not caller.store().exists(join(config.folder, RUN_FILE)):
            return  # it failed before there was a run
        page = report(config.folder, track=True, caller=caller)["report"]
        notify(f"Report      {page}")
    except Exception as error:  # whatever it is, it must not hide how the run ended
        log.warning("the run report was not written: %s: %s", type(error).__name__, error)


def _record(config: RunConfig, storage: Storage, page: bytes) -> None:
    tracker = JournalTracker.open(config, storage)
    tracker.artifact(RUN_REPORT, page)
    tracker.close()
