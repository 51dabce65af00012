"""`mome compare`: runs beside one another, as a table or a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.caller import Caller
from jobs.console import aligned
from jobs.output import write_output
from pipeline.config.errors import ConfigError
from pipeline.pages.formatting import significant
from pipeline.reports.comparison import Comparison, Result, compare, render_comparison
from pipeline.reports.run_folder import open_run

LONGEST = 48  # characters of a value in the table


def compare_runs(runs: list[str], html: Path | None = None, caller: Caller = Caller()) -> Comparison:
    """The runs in these folders (paths or URLs); also a page, where `html` says.

    Raises ConfigError for fewer than two, and, naming it, for a folder without a run.
    """
    if len(runs) < 2:
        raise ConfigError(f"mome compare: expected two runs or more, got {len(runs)}")
    storage = caller.store()
    found = compare([open_run(run, storage) for run in runs])
    if html is not None:
        write_output(storage, str(html), render_comparison(found).encode(), "--html")
    return found


def as_table(found: Comparison) -> str:
    """Two tables: the config's keys that differ, and all results. A mark stands before results that differ."""
    config = [["", "config", *map(_short, found.runs)]]
    for path, values in found.config.items():
        config.append(["", path, *(_config_value(values, run) for run in found.runs)])
    if not found.config:
        config.append(["", "no key differs", *("" for _ in found.runs)])
    results = [["", "results", *map(_short, found.runs)]]
    for group, rows in found.results.items():
        results.append(["", f"{group}:", *("" for _ in found.runs)])
        for row in rows:
            results.append(["*" if row.differs else "", f"  {row.name}", *(_short(_result(v)) for v in row.values)])
    return f"{aligned(config)}\n\n{aligned(results)}"


def _config_value(values: dict[str, Any], run: str) -> str:
    if run not in values:
        return "(no such key)"
    value = values[run]
    return _short(value if isinstance(value, str) else json.dumps(value))


def _result(value: Result) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else significant(value)


def _short(text: str) -> str:
    """Its end, which tells paths apart."""
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"
