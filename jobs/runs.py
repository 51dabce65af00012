"""`mome runs list`: the runs in a folder with their progress. `mome tail`: the metrics that a run records, as lines."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from jobs.configs import Caller
from jobs.console import echo
from pipeline.config.errors import ConfigError
from pipeline.data.storage import Storage, join
from pipeline.pages.charts import moment
from pipeline.reports.run_folder import RunFolder, open_run
from pipeline.training.callbacks import Progress

FOLLOW_SECONDS = 5.0  # interval of reading the journal
RECALL = "i2t_r1"


def list_runs(output: str, caller: Caller = Caller()) -> list[dict[str, Any]]:
    """Return the state of every run in the folder `output`, the latest first. Raises ConfigError if there is none."""
    storage, rows = Storage(caller.storage), []
    for name in sorted({name.rstrip("/") for name in storage.list(output)}):
        with suppress(ConfigError):  # a folder or file of something else
            run = open_run(join(output, name), storage)
            started = [stage for stage in run.stages if stage.starts]
            recalls = [value for p in run.evaluations for key, value in p.values.items() if key.endswith(RECALL)]
            updated = max((session.end for session in run.sessions), default=0)
            rows.append({
                "run": name, "status": status_of(run), "stage": started[-1].config.name if started else None,
                "step": run.reached, "steps": run.config.total_steps, "starts": len(run.sessions),
                "updated": updated, "best_recall": max(recalls, default=None), "folder": run.folder,
            })  # fmt: skip
    if not rows:
        raise ConfigError(f"{output}: no run in it; give the `output` of runs, the folder that contains their folders")
    return sorted(rows, key=lambda row: -int(row["updated"]))


def run_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table of `list_runs`, with its header."""
    table = [["run", "status", "stage", "step", "starts", "best R@1", "last record"]]
    for row in rows:
        recall = "-" if row["best_recall"] is None else f"{row['best_recall']:.1%}"
        reached = (row["stage"] or "-", f"{row['step']:,}/{row['steps']:,}", str(row["starts"]))
        updated = moment(row["updated"]) if row["updated"] else "-"
        table.append([row["run"], row["status"], *reached, recall, updated])
    return table


def status_of(run: RunFolder) -> str:
    """Return running, finished, failed, killed, not started, or unfinished: interrupted, or running elsewhere."""
    if run.is_live:
        return "running"
    return run.status.lower() or ("unfinished" if run.sessions else "not started")


def tail(folder: str, num_lines: int, follow: bool, caller: Caller = Caller()) -> None:
    """Print the last metrics of a run, and with `follow` new ones until it ends. Raises ConfigError if there is no run.

    Of a run on another machine, the records up to its last checkpoint are seen.
    """
    storage, last = Storage(caller.storage), -1
    run = open_run(folder, storage)
    lines = list(_lines(run))
    for at, line in lines[-num_lines:]:
        last = max(last, at)
        echo(line)
    while follow and status_of(run) in ("running", "unfinished", "not started"):
        time.sleep(FOLLOW_SECONDS)
        run = open_run(folder, storage)
        for at, line in _lines(run):
            if at > last:
                last = at
                echo(line)
    echo(f"{run.name}: {status_of(run)}, step {run.reached:,} of {run.config.total_steps:,}", err=True)


def _lines(run: RunFolder) -> Iterator[tuple[int, str]]:
    """Yield the time in milliseconds and the line of all recorded metrics, in order."""
    prefix, total = "train/loss_", run.config.total_steps
    points = [
        (point.at, point, stage) for stage in run.stages for point in stage.points if "train/loss" in point.values
    ]
    for at, point, stage in sorted(points, key=lambda entry: entry[0]):
        values, done = point.values, point.step - stage.first_step
        rate = values.get("perf/samples_per_s", 0.0)
        left = (stage.config.steps - done) * stage.config.global_batch_size / rate if rate else 0.0
        losses = {name.removeprefix(prefix): loss for name, loss in values.items() if name.startswith(prefix)}
        reached = (stage.config.name, done, stage.config.steps, point.step, total)
        progress = Progress(*reached, values["train/loss"], rate, left, values.get("train/lr", 0.0), losses)
        yield at, f"{moment(at)} {run.name}: {progress.line()}"
