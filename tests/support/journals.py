"""Configs, records and stores of runs that are not trained, for tests of tracking."""

from pathlib import Path
from typing import Any

from pipeline.config.load import validate
from pipeline.config.schema import RunConfig
from pipeline.data.storage import ObjectInfo
from pipeline.tracking.journal import CommittedJournal, Journal, JournalWriter

RUN = "memory://run"
URL = f"{RUN}/journal"
STAGE_START = {"kind": "stage", "at": 1, "stage": 0, "name": "one", "params": {}, "tags": {}, "datasets": []}
REPORT = "0123456789abcdef/report.html"  # file of an artifact in a journal


def config_of(output: Path | str, name: str = "run", **tracking: Any) -> RunConfig:
    """Return the config of a run of two stages of 100 steps."""
    stage = {"sources": {"photos": 1.0}, "objectives": {"mim": {}}, "steps": 100, "global_batch_size": 16}
    values = {
        "name": name,
        "output": str(output),
        "sources": {"photos": {"shards": f"{output}/photos"}},
        "stages": [{"name": "vision", **stage}, {"name": "second", **stage}],
        "tracking": tracking,
    }
    return validate(values, "test")


def point(step: int, stage: int | None = 0) -> dict[str, Any]:
    return {"kind": "metrics", "at": 1000 + step, "stage": stage, "step": step, "values": {"loss": float(step)}}


def artifact(file: str = REPORT, name: str = "report.html") -> dict[str, Any]:
    return {"kind": "artifact", "at": 1, "stage": None, "name": name, "file": file}


def steps(journal: Journal) -> list[int]:
    return [record["step"] for record in journal.all_records() if record["kind"] == "metrics"]


def training(journal: Journal, first: int, last: int) -> JournalWriter:
    """Start a session that trains the steps `first` to `last`."""
    writer = JournalWriter(journal)
    for record in (STAGE_START, *map(point, range(first, last + 1))):
        writer.append(record)
    return writer


class Objects(dict[str, bytes]):
    """Object store in memory."""

    read, write, exists = dict.__getitem__, dict.__setitem__, dict.__contains__

    def list_info(self, url: str) -> dict[str, ObjectInfo]:
        names = {key.removeprefix(f"{url}/"): data for key, data in self.items() if key.startswith(f"{url}/")}
        return {name: ObjectInfo(len(data), None) for name, data in names.items() if "/" not in name}


def restored(store: Any, folder: Path, run: str = RUN) -> Journal:
    """Return a new journal of `run` in `folder`, as another machine restores it from the store."""
    journal = Journal(folder)
    CommittedJournal(store, run).restore(journal)
    return journal
