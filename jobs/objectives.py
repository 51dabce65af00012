"""`mome objectives`: which objective a model of which kind learns, and from what; with a trial of every combination."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch

from jobs.console import aligned
from pipeline.config.schema import Objective
from pipeline.training.collectives import Collectives
from pipeline.training.trial import Trial, cells, kinds, readings, train


def objectives(with_trials: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """By objective and kind of model the uses of a source that it reads; the trials, if they are wanted."""
    found: dict[str, Any] = {
        "objectives": {
            objective: {kind: uses for kind in kinds() if (uses := list(readings(objective, kind)))}
            for objective in get_args(Objective)
        }
    }
    if with_trials:
        found["trials"] = _trials(progress)
    return found


def _trials(progress: Callable[[str], None]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # of tensors this small, several threads only wait for each other
    collectives = Collectives()
    try:
        trials = []
        for cell in cells():
            progress(f"training {cell}")
            trials.append(_trial_json(train(cell, collectives)))
        return trials
    finally:
        collectives.close()


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "objective": trial.cell.objective,
        "kind": trial.cell.kind,
        "use": trial.cell.use,
        "keys": trial.cell.keys,
        "start": trial.losses[0],
        "end": trial.losses[-1],
        "floor": trial.floor,
        "is_learnt": trial.is_learnt,
    }


def as_text(found: dict[str, Any]) -> str:
    """The table, one objective a line, then one line for each trial."""
    lines = [["objective", *kinds()]]
    for objective, by_kind in found["objectives"].items():
        lines.append([objective, *(", ".join(by_kind.get(kind, ["·"])) for kind in kinds())])
    tables = [aligned(lines)]
    if "trials" in found:
        header = ["objective", "model", "reads", "with", "loss at the start", "at the end", "of a collapsed model", ""]
        tables.append(aligned([header, *map(_trial_line, found["trials"])]))
    return "\n\n".join(tables)


def _trial_line(trial: dict[str, Any]) -> list[str]:
    keys = ", ".join(key if isinstance(value, dict) else f"{key}: {value}" for key, value in trial["keys"].items())
    floor = "" if trial["floor"] is None else f"{trial['floor']:.4f}"
    told = [
        trial["objective"],
        trial["kind"],
        trial["use"],
        keys,
        f"{trial['start']:.4f}",
        f"{trial['end']:.4f}",
        floor,
    ]
    return [*told, "" if trial["is_learnt"] else "not learnt"]
