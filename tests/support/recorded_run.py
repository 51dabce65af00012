"""The folder of a run of two stages with a restart, a spike, an alert, two evaluations and bad data.

Its journal, quarantine and time account are written by the code that training uses; no step is made.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config.load import apply_override, validate
from pipeline.data.quarantine import BadRecord
from pipeline.data.storage import Storage
from pipeline.reports.run_folder import RunFolder, open_run
from pipeline.tracking.journal import Journal, JournalWriter
from tests.support.bad_shards import Planted
from tests.support.finished_run import SECTION

START = 1_790_000_000_000  # milliseconds since 1970
STEPS = 10  # steps of each stage
RESUMED_AT = 14
SECONDS = {"startup": 60.0, "training": 600.0, "data_wait": 30.0, "checkpoint": 12.0, "restart": 90.0, "lost_work": 8.0}
SPIKE = "step 12: loss 9, median 2; back to step 10 without batches 0 to 2 of the stage"
ALERT = "matching is right for 3 % of the true pairs: raise stages.pairs.objectives.itm.weight"


def record_run(folder: Path, planted: Planted, name: str = "recorded", *overrides: str) -> RunFolder:
    stage = {"steps": STEPS, "global_batch_size": 8, "max_text_length": 12}
    vision = {"name": "vision", "sources": {"pictures": 1.0}, "objectives": {"mim": {}}, **stage}
    pairs = {"name": "pairs", "sources": {"pairs": 1.0}, "objectives": {"itc": {}, "itm": {}}, **stage}
    sources = {"pictures": {"shards": planted.folder, "type": "images"}, "pairs": {"shards": planted.folder}}
    values: dict[str, Any] = {
        "name": name, "output": str(folder), "model": {**SECTION}, "sources": sources, "stages": [vision, pairs],
        "data": {"max_bad_rate": 1.0, "streams": 4}, "evaluation": {"source": "pairs"},
    }  # fmt: skip
    for override in overrides:
        apply_override(values, override)
    cause = {"time": START / 1000 + 99.0, "cause": "failed", "message": "rank 1: killed"}
    account = {"at": START / 1000 + 800, "seconds": SECONDS | {"evaluation": 0.0}, "restarts": 1, "ended": True}
    files = {"run.json": [validate(values, name).model_dump(mode="json")], "time.json": [account]}
    files |= {"restarts/0.json": [cause], "quarantine/1-pairs-00000020.jsonl": list(map(asdict, bad_records(planted)))}
    for file, records in files.items():
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        Storage().write(f"{folder}/{name}/{file}", text.encode())
    _record_journal(folder / name, planted)
    return open_run(f"{folder}/{name}")


def bad_records(planted: Planted) -> list[BadRecord]:
    """Return every planted bad sample once, and the first one twice."""
    records = []
    for kind, bad in ((kind, bad) for kind, all_bad in planted.bad.items() for bad in all_bad):
        place = bad.shard, bad.key, bad.offset, 0, len(records), 0
        records.append(BadRecord("pairs", *place, bad.stage, f"the {kind}", "s00001"))
    return [*records, records[0]]


def _record_journal(place: Path, planted: Planted) -> None:
    """Record a session that is killed in the second stage, one that ends the run, and an evaluation."""
    journal, (names, sources) = Journal(place / "journal"), (("vision", "pairs"), ("pictures", "pairs"))
    digest = json.loads(Path(planted.folder, "manifest.json").read_text(encoding="utf-8"))["digest"]
    tags = {"world_size": "4", "mome.host": "node-1", "mlflow.source.git.commit": "c0ffee", "version.torch": "2"}

    def append(kind: str, stage: int | None = None, **values: Any) -> None:
        nonlocal at
        writer.append({"kind": kind, "at": at, "stage": stage, **values})
        at += 1000  # records are a second apart

    def begin(stage: int, **more: str) -> None:
        origin = "random" if stage == 0 else f"{place}/stages/0-vision"
        read = {"name": sources[stage], "source": planted.folder, "digest": digest, "context": "training"}
        append("stage", stage, name=names[stage], params={}, tags={"start_from": origin, **more}, datasets=[read])

    def train(stage: int, first: int, last: int) -> None:
        for step in range(first, last + 1):
            values = {"train/loss": 8.0 / step, "train/grad_norm": 1.0 + step, "train/lr": 1e-3}
            values |= {"train/loss_itc": 5.0 / step, "train/loss_itm": 3.0 / step} if stage else {}
            for key, value in {"samples": 8.0 * step, "bad": 1.0, "epochs": 0.1}.items():
                values[f"data/{key}/{sources[stage]}"] = value
            append("metrics", stage, step=step, values=values | {"perf/samples_per_s": 40.0})

    for session, run_tags in enumerate((tags, tags, {})):
        writer, at = JournalWriter(journal), START + 100_000 * session
        append("run", run="f00d", params={}, tags=run_tags, datasets=[])
        if session == 0:
            begin(0)
            train(0, 1, STEPS)
            append("stage_end", 0, status="FINISHED")
            begin(1)
            append("tag", 1, key="mome.spike.1", value=SPIKE)
            train(1, STEPS + 1, RESUMED_AT + 2)
        elif session == 1:
            begin(1, resumed_at=str(RESUMED_AT))
            train(1, RESUMED_AT + 3, 2 * STEPS)
            append("tag", 1, key="mome.alert.matching_collapsed", value=ALERT)
            for text in ("since step 18: add workers", "resolved at step 19; since step 18: the loader is slow"):
                append("tag", 1, key="mome.alert.starved", value=text)
            append("stage_end", 1, status="FINISHED")
            append("run_end", status="FINISHED")
        else:
            for recall in (0.25, 0.5):
                values = {"eval/pairs/pairs": 64.0, "eval/pairs/i2t_r1": recall, "eval/pairs/t2i_r1": recall / 2}
                append("metrics", step=2 * STEPS, values=values)
        writer.close()
