"""`mome report`: a page about one run in its folder and in MLflow. `mome compare`: a table of several runs."""

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.configs import URI_VARIABLE, Caller
from jobs.console import RunDisplay, aligned, notify, write_output
from pipeline.config.errors import ConfigError
from pipeline.config.load import RecordedLocation
from pipeline.config.redaction import redact
from pipeline.config.schema import RunConfig
from pipeline.config.urls import absolute
from pipeline.data.storage import Storage, join
from pipeline.reports import run_report
from pipeline.reports.run_folder import open_run
from pipeline.tracking.locations import absolute_uri, configured_uri, default_uri, read_run_id, tracking_uri
from pipeline.tracking.tracker import Tracker
from pipeline.training.prepare import RUN_FILE

log = logging.getLogger(__name__)

RUN_REPORT = "run_report.html"
COLUMNS, KEY_CHARACTERS, MAX_CHARACTERS = 80, 36, 48  # of the comparison table, of a key, and of a value


def report(
    run: str,
    out: Path | None = None,
    price: float | None = None,
    against: list[str] | None = None,
    track: bool | None = None,
    caller: Caller = Caller(),
) -> dict[str, Any]:
    """Write the run's page to its folder or `out`, and to MLflow (`open_tracker`) unless active. Raises ConfigError."""
    opened = open_run(run, Storage(caller.storage))
    config = caller.applied(opened.config)
    summary = run_report.collect_report(opened, price, None if config.tracking.uri is None else tracking_uri(config))
    runs = [opened, *(open_run(other, opened.storage) for other in against or ())]
    page = run_report.render_run_report(summary, run_report.compare(runs) if against else None).encode()
    url = str(out) if out is not None else join(opened.folder, RUN_REPORT)
    if out is None:
        opened.storage.write(url, page)
    else:
        write_output(opened.storage, url, page, "--out")
    is_idle = opened.run and not opened.is_live  # a training process commits its own journal
    if is_idle and (tracker := open_tracker(track, config, opened.recorded, opened.storage)):
        tracker.artifact(RUN_REPORT, page)
        tracker.close()
    cost, alerts = summary.cost, [tag for tag in summary.alerts if not tag.value.startswith(run_report.OVER)]
    return {
        "report": url, "status": summary.status, "step": opened.reached, "goodput": opened.goodput,
        "restarts": opened.num_restarts, "bad_samples": summary.bad_samples,
        "alerts": [tag.key.removeprefix(run_report.ALERT) for tag in alerts], "rank_hours": cost and cost.rank_hours,
        "cost": cost.total if cost and cost.price else None,
    }  # fmt: skip


def open_tracker(track: bool | None, config: RunConfig, recorded: RecordedLocation, storage: Storage) -> Tracker | None:
    """Open the tracker of a folder's run if `track`; if that is None, only for a run tracked there and no copy of it.

    `config` is as `Caller.applied` makes it.
    """
    reason = ""
    if track is None:
        places = [absolute(folder) for folder in (recorded.folder, config.folder)]
        known, own = recorded.tracking_uri or default_uri(config.output), configured_uri(config)
        if read_run_id(config, storage) is None:
            reason = f"{config.folder} is no tracked run"
        elif len({place if "://" in place else os.path.realpath(place) for place in places}) > 1:
            reason = f"it is a copy of {recorded.folder}"
        elif redact(absolute_uri(known)) != redact(absolute_uri(own)):
            remedy = f"to record there, set {URI_VARIABLE}, or name the config that it was trained with (--config)"
            reason = f"the run was tracked at {redact(known)}; {remedy}"
    if reason:
        notify(f"not recorded in MLflow: {reason}. Give --track to record it in {redact(configured_uri(config))}")
    return None if track is False or reason else Tracker.open(config, storage)


@contextmanager
def reported(config: RunConfig, display: RunDisplay) -> Iterator[None]:
    """Write the run's page when the block ends, unless a ConfigError ended it before anything was started."""
    is_started, fault = True, ""
    try:
        yield
    except Exception as error:
        is_started, fault = not isinstance(error, ConfigError), str(error)
        raise
    finally:
        caller = Caller.of(config)
        try:  # the run's file is absent if the run failed before it was created
            if is_started and Storage(caller.storage).exists(join(config.folder, RUN_FILE)):
                display.phase("writing the report")
                url = report(config.folder, track=True, caller=caller)["report"]
                notify(f"Report      {url}")
        except Exception as error:  # an error of the report must not hide how the run ended
            if str(error) != fault:  # the store's answer, which ended the run already
                log.warning("no run report: %s: %s", type(error).__name__, error)


def compare_runs(runs: list[str], html: Path | None = None, caller: Caller = Caller()) -> tuple[dict[str, Any], str]:
    """Return what `--json` prints and two tables, results first; write the page `html`. Raises ConfigError."""
    if len(runs) < 2:
        raise ConfigError(f"mome compare: expected two runs or more, got {len(runs)}")
    storage = Storage(caller.storage)
    comparison = run_report.compare([open_run(run, storage) for run in runs])
    if html is not None:
        write_output(storage, str(html), run_report.render_comparison(comparison).encode(), "--html")
    names, by_name = comparison.runs, dict[str, dict[str, run_report.Result]]()
    config, results = [["config", *names]], [["results", *names]]
    for path, settings in comparison.config.items():
        texts = {run: value if isinstance(value, str) else json.dumps(value) for run, value in settings.items()}
        config.append([path, *(texts.get(run, "not set") for run in names)])
    if not comparison.config:
        config.append(["no key differs", *("" for _ in names)])
    for group, rows in comparison.results.items():
        results.append([f"{group}:", *("" for _ in names)])
        for name, values in rows.items():
            best, cells = run_report.best_of(name, values), [run_report.readable_result(name, v) for v in values]
            cells = [f"{cell} *" if number == best else cell for number, cell in enumerate(cells)]
            results.append([f"  {run_report.readable_metric(name)}", *cells])
            finite = [None if isinstance(v, float) and not math.isfinite(v) else v for v in values]
            by_name[f"{name} ({group})" if name in by_name else name] = dict(zip(names, finite, strict=True))
    width = min(MAX_CHARACTERS, max(12, (COLUMNS - KEY_CHARACTERS) // len(names) - 2))
    for row in (*config, *results):  # of a long text the end is kept, in which paths differ
        row[0] = row[0] if len(row[0]) <= KEY_CHARACTERS or not any(row[1:]) else f"…{row[0][1 - KEY_CHARACTERS :]}"
        row[1:] = [t if len(t) <= width else f"…{t[1 - width :]}" for t in row[1:]]
    headings = [row[0] for row in results if not any(row[1:])]
    for row in results:  # headings do not widen the column
        row[0] = "" if row[0] in headings and not any(row[1:]) else row[0]
    lines = aligned(results).splitlines()
    for number in (number for number, row in enumerate(results) if not any(row)):
        lines[number] = headings.pop(0)
    table = "\n".join([*lines, "* best value", "", aligned(config)])
    return {"runs": names, "config": comparison.config, "results": by_name}, table
