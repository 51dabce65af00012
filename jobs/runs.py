"""`mome runs list`: the runs in a folder with their progress. `mome tail`: the metrics that a run records, as lines."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from jobs.configs import Caller
from jobs.console import echo, with_prefix
from pipeline.config.errors import ConfigError
from pipeline.data.storage import Storage, join
from pipeline.pages.charts import moment
from pipeline.reports.run_folder import RunFolder, open_run
from pipeline.reports.run_report import readable_metric, readable_result
from pipeline.training.callbacks import Progress
from pipeline.training.goodput import read_record

FOLLOW_SECONDS = 5.0  # interval of reading the journal
SILENT_SECONDS = 60.0  # since the last heartbeat of a run that is taken for interrupted
STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
# Evaluation metrics by which runs are listed: the first that a run has.
RANKING = (
    *("i2t_r1", "vqa_accuracy", "nlvr2_accuracy", "classification_top1", "zero_shot_top1", "linear_probe_top1"),
    *("itm_accuracy", "mlm_accuracy"),
)


def list_runs(output: str, with_sizes: bool = False, caller: Caller = Caller()) -> list[dict[str, Any]]:
    """Return the state of every run in the folder `output`, the latest first. Raises ConfigError if there is none."""
    storage, rows = Storage(caller.storage), []
    for name in sorted({name.rstrip("/") for name in storage.list(output)}):
        with suppress(ConfigError):  # a folder or file of something else
            run = open_run(join(output, name), storage)
            started = [stage for stage in run.stages if stage.starts]
            updated = max((session.end for session in run.sessions), default=0)
            metric, value = best_metric(run)
            rows.append({
                "run": name, "status": status_of(run), "stage": started[-1].config.name if started else None,
                "step": run.reached, "steps": run.config.total_steps, "starts": len(run.sessions),
                "updated": updated, "metric": metric, "best": value, "folder": run.folder,
                "bytes": folder_bytes(storage, run.folder) if with_sizes else None,
            })  # fmt: skip
    if not rows:
        raise ConfigError(f"{output}: no run in it; give the `output` of runs, the folder that contains their folders")
    return sorted(rows, key=lambda row: -int(row["updated"]))


def run_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table of `list_runs`, with its header."""
    table = [["run", "status", "stage", "step", "starts", "best", "last record", "size"]]
    for row in rows:
        metric = row["metric"]
        best = "-" if metric is None else f"{readable_result(metric, row['best'])} {readable_metric(metric)}"
        reached = (row["stage"] or "-", f"{row['step']:,}/{row['steps']:,}", str(row["starts"]))
        updated = moment(row["updated"]) if row["updated"] else "-"
        size = "" if row["bytes"] is None else with_prefix(row["bytes"], "B")
        table.append([row["run"], row["status"], *reached, best, updated, size])
    return table if any(row[-1] for row in table[1:]) else [row[:-1] for row in table]


def best_metric(run: RunFolder) -> tuple[str | None, float | None]:
    """Return the metric that ranks a run and its best value; its last loss if it was never evaluated."""
    values = [entry for point in run.evaluations for entry in point.values.items()]
    for name in RANKING:
        ranked = [(value, metric) for metric, value in values if metric.endswith(f"/{name}")]
        if ranked:
            best, metric = max(ranked)
            return metric, best
    losses = [stage.last["train/loss"] for stage in run.stages if "train/loss" in stage.last]
    return ("train/loss", losses[-1]) if losses else (None, None)


def folder_bytes(storage: Storage, folder: str) -> int:
    """Return the number of bytes of all files below a folder."""
    sizes = [
        folder_bytes(storage, join(folder, name.rstrip("/"))) if info is None else info.size
        for name, info in storage.entries(folder).items()
    ]
    return sum(sizes)


def status_of(run: RunFolder) -> str:
    """Return running, finished, failed, stopped (saved after a signal), interrupted (killed), or not started."""
    if run.is_live:
        return "running"
    if run.status:
        return STATUS[run.status]
    if not run.sessions:
        return "not started"
    beat = read_record(run.storage, run.folder) or {}
    is_recent = not beat.get("ended", True) and time.time() - beat.get("at", 0.0) < SILENT_SECONDS
    return "running" if is_recent else "interrupted"


def tail(folder: str, num_lines: int, follow: bool, caller: Caller = Caller()) -> None:
    """Print the last metrics of a run, and with `follow` new ones until it ends. Raises ConfigError if there is no run.

    Of a run on another machine, the records up to its last checkpoint are seen.
    """
    storage = Storage(caller.storage)
    run = open_run(folder, storage)
    lines = list(_lines(run))
    printed = {key for key, _ in lines}
    for _, line in lines[-num_lines:]:
        echo(line)
    while follow and status_of(run) in ("running", "not started"):
        time.sleep(FOLLOW_SECONDS)
        run = open_run(folder, storage)
        for key, line in _lines(run):
            if key not in printed:
                printed.add(key)
                echo(line)
    state = status_of(run)
    hint = "; no process has written to it for a minute: re-run its command to resume" if state == "interrupted" else ""
    echo(f"{run.name}: {state}, step {run.reached:,} of {run.config.total_steps:,}{hint}", err=True)


def _lines(run: RunFolder) -> Iterator[tuple[tuple[int, int, str], str]]:
    """Yield the key (milliseconds, step, stage) and the line of all recorded metrics, in order."""
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
        yield (at, point.step, stage.config.name), f"{moment(at)} {run.name}: {progress.line()}"
