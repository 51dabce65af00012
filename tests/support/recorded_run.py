"""The folder of a run of two stages with a restart, a spike, an alert, two evaluations and bad data.

Its journal, quarantine and time account are written by the code that training uses; no step is made.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.load import apply_override, validate
from pipeline.data.quarantine import BadRecord
from pipeline.tracking.journal import Journal, JournalWriter
from pipeline.tracking.tracker import DatasetInput
from tests.support.bad_shards import Planted
from tests.support.finished_run import SECTION

START = 1_790_000_000_000  # milliseconds since 1970
STEPS = 10  # steps of each stage
RESUMED_AT = 14
SECONDS = {"startup": 60.0, "training": 600.0, "data_wait": 30.0, "checkpoint": 12.0, "restart": 90.0, "lost_work": 8.0}
SPIKE = "step 12: loss 9, median 2; back to step 10 without batches 0 to 2 of the stage"
ALERT = "matching is right for 3 % of the true pairs: raise stages.pairs.objectives.itm.weight"


def record_run(folder: Path, planted: Planted, name: str = "recorded", *overrides: str) -> None:
    """Write `<folder>/<name>`."""
    stage = {"steps": STEPS, "global_batch_size": 8, "max_text_length": 12}
    values: dict[str, Any] = {
        "name": name,
        "output": str(folder),
        "model": {**SECTION},
        "sources": {"pictures": {"shards": planted.folder, "type": "images"}, "pairs": {"shards": planted.folder}},
        "data": {"max_bad_rate": 1.0, "streams": 4},
        "stages": [
            {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"mim": {}}, **stage},
            {"name": "pairs", "sources": {"pairs": 1.0}, "objectives": {"itc": {}, "itm": {}}, **stage},
        ],
        "evaluation": {"source": "pairs"},
    }
    for override in overrides:
        apply_override(values, override)
    cause = {"time": START / 1000 + 99.0, "cause": "failed", "message": "rank 1: killed"}
    account = {"at": START / 1000 + 800, "seconds": SECONDS | {"evaluation": 0.0}, "restarts": 1, "ended": True}
    for file, text in {
        "run.json": validate(values, name).model_dump_json(),
        "time.json": json.dumps(account),
        "restarts/0.json": json.dumps(cause),
        "quarantine/1-pairs-00000020.jsonl": "\n".join(json.dumps(asdict(r)) for r in bad_records(planted)) + "\n",
    }.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    _record_journal(folder / name, planted)


def bad_records(planted: Planted) -> list[BadRecord]:
    """Return every planted bad sample once, and the first one twice."""
    records = [
        BadRecord("pairs", bad.shard, bad.key, bad.offset, 0, number, 0, bad.stage, f"the {kind}", "s00001")
        for number, (kind, bad) in enumerate((kind, bad) for kind, all_bad in planted.bad.items() for bad in all_bad)
    ]
    return [*records, records[0]]


class _Session:
    """The records of one process, a second apart."""

    def __init__(self, journal: Journal, at: int, **tags: str):
        self.writer = JournalWriter(journal)
        self.at = at
        self.append("run", run="f00d", params={}, tags=tags, datasets=[])

    def append(self, kind: str, stage: int | None = None, **values: Any) -> None:
        self.writer.append({"kind": kind, "at": self.at, "stage": stage, **values})
        self.at += 1000

    def steps(self, stage: int, first: int, last: int) -> None:
        """Record metrics of the global steps `first` to `last`."""
        source = "pairs" if stage else "pictures"
        for step in range(first, last + 1):
            values = {"train/loss": 8.0 / step, "train/grad_norm": 1.0 + step, "train/lr": 1e-3}
            values |= {"train/loss_itc": 5.0 / step, "train/loss_itm": 3.0 / step} if stage else {}
            values |= {f"data/samples/{source}": 8.0 * step, f"data/bad/{source}": 1.0, f"data/epochs/{source}": 0.1}
            self.append("metrics", stage, step=step, values=values | {"perf/samples_per_s": 40.0})


def _record_journal(place: Path, planted: Planted) -> None:
    journal = Journal(place / "journal")
    digest = json.loads(Path(planted.folder, "manifest.json").read_text(encoding="utf-8"))["digest"]
    tags = {"world_size": "4", "mome.host": "node-1", "mlflow.source.git.commit": "c0ffee", "version.torch": "2"}

    def begin(session: _Session, stage: int, **more: str) -> None:
        name = ("vision", "pairs")[stage]
        origin = "random" if stage == 0 else f"{place}/stages/0-vision"
        read = asdict(DatasetInput(("pictures", "pairs")[stage], planted.folder, digest))
        session.append("stage", stage, name=name, params={}, tags={"start_from": origin, **more}, datasets=[read])

    first = _Session(journal, START, **tags)
    begin(first, 0)
    first.steps(0, 1, STEPS)
    first.append("stage_end", 0, status="FINISHED")
    begin(first, 1)
    first.append("tag", 1, key="mome.spike.1", value=SPIKE)
    first.steps(1, STEPS + 1, RESUMED_AT + 2)
    first.writer.close()

    second = _Session(journal, START + 100_000, **tags)
    begin(second, 1, resumed_at=str(RESUMED_AT))
    second.steps(1, RESUMED_AT + 3, 2 * STEPS)
    for key, value in (
        ("matching_collapsed", ALERT),
        ("starved", "since step 18: the loader is slow: add workers"),
        ("starved", "over at step 19; since step 18: the loader is slow"),
    ):
        second.append("tag", 1, key=f"mome.alert.{key}", value=value)
    second.append("stage_end", 1, status="FINISHED")
    second.append("run_end", status="FINISHED")
    second.writer.close()

    evaluation = _Session(journal, START + 200_000)
    for recall in (0.25, 0.5):
        values = {"eval/pairs/pairs": 64.0, "eval/pairs/i2t_r1": recall, "eval/pairs/t2i_r1": recall / 2}
        evaluation.append("metrics", step=2 * STEPS, values=values)
    evaluation.writer.close()
