"""Results of commands as tables and sentences; `--json` prints the same results as one object."""

from __future__ import annotations

import shlex
from typing import Any

from jobs.console import aligned, line_width, short_time, three_digits, with_prefix
from pipeline.pages.charts import FRACTIONS

RECALLS = {"r1": "R@1", "r5": "R@5", "r10": "R@10"}


def evaluation_text(result: dict[str, Any]) -> str:
    """Return a table for each kind of retrieval, then a row for each other task and for what was evaluated."""
    tables, rows = [], []
    for task, values in result.items():
        if not isinstance(values, dict):
            continue
        if "image_to_text" not in values:
            known = [(name.replace("_", " "), value, name) for name, value in values.items() if value is not None]
            rows.append([task, ", ".join(f"{text} {_figure(name, value)}" for text, value, name in known)])
            continue
        table = [[task, *RECALLS.values(), "median rank"]]
        for direction in ("image_to_text", "text_to_image", "chance"):
            own = values.get(direction, {})
            recalls = [f"{own[key]:.1%}" if key in own else "" for key in RECALLS]
            rank = f"{own['median_rank']:g}" if "median_rank" in own else ""
            table.append([direction.replace("_", " "), *recalls, rank])
        tables.append(aligned(table, right={1, 2, 3, 4}))
        scores = f"scored by {values['by']}" if "by" in values else f"the best {values.get('best')} of each query"
        images = f", {values['images']:,} images" if values.get("images") else ""
        rows.append([task, f"{scores}{images}"])
    counts = f"{result['pairs']:,} images, {result['captions']:,} captions" if "pairs" in result else ""
    skipped = f", {result['skipped']:,} skipped" if result.get("skipped") else ""
    rows.append(["source", f"{result.get('source')}: {counts}{skipped}"])
    if result.get("trained_on"):
        rows.append(["trained on", f"this source, in {', '.join(result['trained_on'])}: the results are not held-out"])
    rows += [[name, str(result[name])] for name in ("stage", "checkpoint", "report") if result.get(name)]
    return "\n\n".join([*tables, aligned(rows, width=line_width())])


def preflight_text(result: dict[str, Any]) -> str:
    """Return a row for each check of the ranks, all of which passed."""
    rows = [[name, f"{own['seconds']:.1f} s", own["message"]] for name, own in result.items()]
    return aligned(rows, right={1}, width=line_width())


def prediction_text(result: dict[str, Any]) -> str:
    """Return a row for each predicted answer, class or word with its probability, and for each score."""
    rows: list[list[str]] = []
    for name, value in result.items():
        if name in ("stage", "checkpoint"):
            continue
        several = value if isinstance(value, list) else [value]
        for number, own in enumerate(several, 1):
            heading = f"[MASK] {number}" if name == "words" else name
            if isinstance(own, dict):
                entries = [[key, f"{probability:.1%}"] for key, probability in own.items()]
                rows += [[heading if row == 0 else "", *entry] for row, entry in enumerate(entries)]
            else:
                rows.append([heading, _figure(name, own), ""])
    return f"{aligned(rows)}\nfrom stage {result['stage']} of {result['checkpoint']}"


def explanation_text(result: dict[str, Any]) -> str:
    """Return for each word its hottest patch and the model's best guess with and without the image."""
    rows = [["word", "patch", "guess with the image", "without it"]]
    for word in result["words"]:
        patch = word["hottest_patch"]
        best = [word[condition]["guesses"][0] for condition in ("with_image", "without_image")]
        guesses = [f"{guess['word']} {guess['probability']:.1%}" for guess in best]
        rows.append([word["word"], f"row {patch['row'] + 1}, column {patch['column'] + 1}", *guesses])
    return "\n".join([aligned(rows), "", f"Wrote {result['out']}", *result["notes"]])


def embedding_text(result: dict[str, Any]) -> str:
    """Return what `mome embed` wrote."""
    shards = f"{result['shards']:,} shard{'s' * (result['shards'] != 1)}"
    earlier = f", {result['already_done']} of them by earlier runs" if result["already_done"] else ""
    written = f"{result['images']:,} images and {result['captions']:,} captions of {shards}{earlier}"
    return f"Wrote the embeddings of {written}, to {result['out']}"


def import_text(result: dict[str, Any]) -> str:
    """Return what was imported, what is drawn at random, and how it is used."""
    model, folder = result["model"], result["checkpoint"]
    size = f"{result['parameters'] / 1e6:,.1f} M parameters, {', '.join(dict.fromkeys(result['objectives']))}"
    lines = [f"Wrote {folder}: {model['kind']}, {size}"]
    if result["absent"]:
        lines.append(f"Not in the file, drawn at random when a stage needs it: {', '.join(result['absent'])}")
    lines += [f"{name}: {count:,} entries" for name, count in result["choices"].items()]
    evaluate = f"mome evaluate {shlex.quote(folder)} --source URL"
    lines.append(f"Start a stage from it with `start_from: {folder}`, or evaluate it: {evaluate}")
    return "\n".join(lines)


def export_text(result: dict[str, Any]) -> str:
    """Return what was exported and what the format has no names for."""
    size = f"{result['tensors']:,} tensors, {with_prefix(result['bytes'], 'B')}"
    lines = [f"Wrote {result['path']}: {size}, under the names of {result['format']}"]
    if result["left_out"]:
        lines.append(f"Left out, because the format has no names for them: {', '.join(result['left_out'])}")
    return "\n".join(lines)


def report_text(result: dict[str, Any]) -> str:
    """Return where a run's page is, and the state of the run."""
    facts = [f"{result['status']} at step {result['step']:,}", f"{result['restarts']} restarts"]
    facts += [f"goodput {result['goodput']:.1%}"] if result["goodput"] is not None else []
    facts += [f"{three_digits(result['rank_hours'])} rank-hours"] if result["rank_hours"] else []
    facts += [f"cost {three_digits(result['cost'])}"] if result["cost"] is not None else []
    facts += [f"{result['bad_samples']:,} bad samples replaced"] if result["bad_samples"] else []
    alerts = [f"Open alert: {alert}" for alert in result["alerts"]]
    return "\n".join([f"Wrote {result['report']}: {', '.join(facts)}", *alerts])


def job_text(result: dict[str, Any]) -> str:
    """Return the state of a job, with the last progress of its run if it is known."""
    from pipeline.training.callbacks import Progress

    rows = [[name, str(value)] for name, value in result.items() if value and name != "progress"]
    if progress := result.get("progress"):
        rows.append(["progress", Progress(**progress | {"phase": ""}).line()])
        rows += [["phase", progress["phase"]]] if progress.get("phase") else []
    return aligned(rows, width=line_width())


def checkpoint_text(result: dict[str, Any]) -> str:
    """Return how long saves stall training."""
    limit, steps = result["store_mb_per_second"], result["step_seconds"]
    size = f"{result['parameters'] / 1e6:,.1f} M parameters, {with_prefix(result['bytes'], 'B')}"
    rows = [["training waits for", ""], ["a synchronous save", short_time(result["synchronous_seconds"])]]
    rows.append(["an asynchronous save", f"{short_time(result['stall_seconds'])} ({result['ratio']:.1%})"])
    rows.append(["host memory, once", short_time(result["reserve_seconds"])])
    rows.append(["restoring", short_time(result["restore_seconds"])])
    rows.append(["a step", f"{short_time(steps['alone'])}, beside a save {short_time(steps['beside_a_save'])}"])
    store = f"store of {limit:g} MB/s" if limit else "store without a limit"
    return "\n".join([f"{size}; {store}; medians of {result['rounds']} rounds", "", aligned(rows)])


def _figure(name: str, value: Any) -> str:
    """Return a fraction in percent, another number with four digits."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.1%}" if FRACTIONS.search(name) else f"{value:.4g}"
