"""Short runs of one stage that answer a question about a recipe, in a temporary folder; the run stays untouched.

`mome train --lr-range` trains with a rising learning rate and suggests one (arXiv 1506.01186). `mome train --overfit N`
trains on N samples, whose loss a recipe that can learn brings near zero. Both train in this process, on one GPU if
there is any.
"""

import math
import statistics
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.console import aligned, status, three_digits
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import with_absolute_paths
from pipeline.config.schema import AugmentConfig, RunConfig, SourceConfig, StageConfig
from pipeline.data.building.importers import write_tar
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.contents.choices import ANSWERS, CLASSES
from pipeline.data.reading.samples import iter_samples
from pipeline.data.shards.manifest import ensure_indexed, index_shards, parse_pattern
from pipeline.data.shards.source import open_source
from pipeline.data.storage import Storage, join
from pipeline.training.callbacks import Callback, Progress, StepEvent
from pipeline.training.checkpoint.committed import is_committed
from pipeline.training.checkpoint.weights import stage_url
from pipeline.training.loop import train
from pipeline.training.prepare import VOCABULARY, apart, choose_tokenizer

SMOOTHING = 0.9  # of the losses, an exponential average
MIN_POINTS, ROWS, BAR = 10, 12, 40  # of a test, of its table; columns of the longest bar
MARGIN = 3.0  # between the rate of the lowest loss and the one to use
LEARNS = 0.02  # relative fall of the smoothed loss below which no rate is suggested
LAST_STEPS = 5  # whose mean loss is the result of overfitting
MEMORISED = 0.2  # fraction of the first loss at which a recipe is taken to learn


class LossRecorder(Callback):
    """Keeps the learning rate and the losses of every step."""

    def __init__(self) -> None:
        self.points: list[tuple[float, dict[str, float]]] = []

    def after_step(self, event: StepEvent) -> None:
        if event.health is not None:
            self.points.append((event.lr, event.health.losses))


def train_in_scratch(config: RunConfig, stage: StageConfig, folder: str) -> list[tuple[float, dict[str, float]]]:
    """Train one stage in `folder` without tracking or evaluation; return each step's learning rate and losses."""
    scratch, recorder = apart(config, Storage(config.storage), folder, config.name), LossRecorder()
    sections: dict[str, dict[str, Any]] = {
        "guards": {"health_check_every": 1, "spike": None},
        "checkpoint": {"every": stage.steps + 1, "keep_best": None},
        "tracking": {"uri": None, "required": False, "profile": None},
        "evaluation": {"source": None, "every": None},
    }
    changed = {name: getattr(scratch, name).model_copy(update=values) for name, values in sections.items()}
    with status("starting") as update:

        def report(progress: Progress) -> None:
            update(f"step {progress.stage_step} of {stage.steps}, loss {progress.loss:.4g}")

        try:
            train(scratch.model_copy(update={"stages": (stage,), **changed}), report, callbacks=[recorder])
        except RunFailed:  # the loss is no longer finite
            if len(recorder.points) < MIN_POINTS:
                raise
    return recorder.points


def start_of(config: RunConfig, stage: StageConfig) -> str:
    """Return the weights that a stage starts from: those of the stage before it are random until it is finished."""
    index = config.stages.index(stage)
    if stage.start_from != "previous":
        return stage.start_from
    is_finished = index > 0 and is_committed(Storage(config.storage), stage_url(config, index - 1))
    return stage_url(config, index - 1) if is_finished else "random"


def try_learning_rates(config: RunConfig, stage: str | None, limits: str, steps: int) -> tuple[dict[str, Any], str]:
    """Train a stage for `steps` steps at rates that rise between `limits` ('A:B'); return the result and its text.

    A stage that continues an earlier one starts from its weights if those are finished, else from random ones. Raises
    ConfigError for other limits, and RunFailed if too few steps had a finite loss.
    """
    try:
        low, high = map(float, limits.split(":"))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 < low < high < math.inf:
        raise ConfigError(f"--lr-range {limits}: expected two learning rates A:B with 0 < A < B, such as 1e-6:1e-1")
    config = with_absolute_paths(config)
    chosen = config.stage_named(stage)
    start = start_of(config, chosen)
    rates = {"lr": high, "min_lr": low, "warmup_steps": 0, "lr_schedule": "exponential"}
    optimizer = chosen.optimizer.model_copy(update=rates)
    ramp = chosen.model_copy(update={"optimizer": optimizer, "steps": steps, "start_from": start})
    with tempfile.TemporaryDirectory(prefix="mome-lr-range-") as folder:
        points = train_in_scratch(config, ramp, folder)
    result = suggest_rate([(lr, losses["loss"]) for lr, losses in points]) | {"stage": chosen.name, "start_from": start}
    return result, _as_text(result, f"stages.{chosen.name}.optimizer.lr")


def overfit(config: RunConfig, stage: str | None, num_samples: int, steps: int) -> tuple[dict[str, Any], str]:
    """Train a stage on the first `num_samples` samples of each source, all in every step; return the result and text.

    There is no augmentation, drop path or dropout; words and patches are masked anew in every step. `learns` is True if
    the loss fell to a fifth. Raises ConfigError for fewer than two samples, DataError as training does.
    """
    if num_samples < 2:
        raise ConfigError(f"--overfit {num_samples}: expected two samples or more, because contrast needs negatives")
    config, storage = with_absolute_paths(config), Storage(config.storage)
    chosen = config.stage_named(stage)
    build_synthetic(storage, config.sources)
    with tempfile.TemporaryDirectory(prefix="mome-overfit-") as folder:
        sources = {}
        for name in chosen.sources:
            ensure_indexed(storage, (own := config.sources[name]).shards)
            target = Path(folder, "sources", name)
            target.mkdir(parents=True)
            samples = islice(iter_samples(storage, open_source(storage, own, folder)), num_samples)
            write_tar(target / "000000.tar", ({"__key__": sample.key, **sample.members} for sample in samples))
            index_shards(storage, str(target))
            for labels in (ANSWERS, CLASSES):
                if storage.exists(url := join(parse_pattern(own.shards).folder, labels)):
                    storage.write(join(str(target), labels), storage.read(url))
            sources[name] = SourceConfig(shards=str(target), type=own.type)
        vocabulary = join(folder, VOCABULARY)
        storage.write(vocabulary, choose_tokenizer(config, storage).vocabulary_file)
        still = AugmentConfig(crop_scale=(1.0, 1.0), flip=False, num_ops=0)
        fixed = {"drop_path": 0.0, "dropout": 0.0, "max_visible_patches": None}
        model = {key: value for key, value in fixed.items() if hasattr(config.model, key)}
        optimizer = {"warmup_steps": min(10, steps // 4), "lr_schedule": "constant"}
        alone = chosen.model_copy(
            update={
                "steps": steps, "global_batch_size": num_samples, "start_from": start_of(config, chosen),
                "optimizer": chosen.optimizer.model_copy(update=optimizer), "buckets": None,
            }
        )  # fmt: skip
        few = config.model_copy(
            update={
                "sources": sources, "model": config.model.model_copy(update=model), "stages": (alone,),
                "data": config.data.model_copy(update={"streams": 1, "augment": still, "max_bad_rate": 1.0}),
                "tokenizer": config.tokenizer.model_copy(update={"vocabulary": vocabulary}),
                "name": "overfit", "output": folder,
            }
        )  # fmt: skip
        losses = [losses for _, losses in train_in_scratch(few, alone, folder)]
    last = {name: statistics.fmean(own[name] for own in losses[-LAST_STEPS:]) for name in losses[0]}
    learns = last["loss"] <= MEMORISED * losses[0]["loss"]
    table = [["loss", "first step", f"last {LAST_STEPS}"]]
    for name, value in last.items():
        table.append([name, three_digits(losses[0][name]), three_digits(value)])
    verdict = (
        f"{num_samples} samples are memorised in {len(losses)} steps: the recipe can learn"
        if learns
        else f"the loss of {num_samples} samples does not fall to a fifth in {len(losses)} steps: check the objective "
        "that stays, optimizer.lr (--lr-range), model.init_std and what the model starts from, or raise --trial-steps"
    )
    result = {"learns": learns, "stage": chosen.name, "steps": len(losses), "first": losses[0], "last": last}
    return result, f"{verdict}\n\n{aligned(table, right=(1, 2))}"


def suggest_rate(points: list[tuple[float, float]]) -> dict[str, Any]:
    """Return a rate `MARGIN` times below that of the lowest smoothed loss; None if the loss does not fall.

    The average lags behind the loss, and a rate that still lowers the loss in a few steps is too high for many.
    """
    smoothed, average = list[float](), 0.0
    for number, (_, loss) in enumerate(points, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**number))
    lowest = min(range(len(points)), key=smoothed.__getitem__)
    is_learning = smoothed[lowest] < (1 - LEARNS) * smoothed[0]
    rate = float(f"{points[lowest][0] / MARGIN:.1g}") if is_learning else None
    return {
        "lr": rate, "lowest_at": points[lowest][0], "first_loss": smoothed[0], "lowest_loss": smoothed[lowest],
        "points": [{"lr": lr, "loss": loss, "smoothed": s} for (lr, loss), s in zip(points, smoothed, strict=True)],
    }  # fmt: skip


def _as_text(result: dict[str, Any], key: str) -> str:
    """Return the suggestion, and a table of rates and losses with a bar for each smoothed loss."""
    first, lowest = three_digits(result["first_loss"]), three_digits(result["lowest_loss"])
    verdict = (
        f"the loss falls from {first} to {lowest}, its lowest at {result['lowest_at']:.2g}; a rate {MARGIN:g} times "
        f"below that is a good start:\n  {key}={result['lr']:g}"
        if result["lr"] is not None
        else f"no rate lowers the loss ({first}, at best {lowest}): check the data, model.init_std and --trial-steps"
    )
    points = result["points"]
    rows = [points[number * (len(points) - 1) // (ROWS - 1)] for number in range(ROWS)]
    finite = [p["smoothed"] for p in points if math.isfinite(p["smoothed"])]
    low, high = min(finite), max(finite)
    table = [["lr", "loss", "smoothed", ""]]
    for p in rows:
        height = (p["smoothed"] - low) / ((high - low) or 1.0)
        length = round(BAR * height) if math.isfinite(height) else BAR
        table.append([f"{p['lr']:.2g}", f"{p['loss']:.4g}", f"{p['smoothed']:.4g}", "█" * (length + 1)])
    return f"{verdict}\n\n{aligned(table, right=(0, 1, 2))}"
