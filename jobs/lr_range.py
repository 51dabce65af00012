"""`mome train --lr-range`: train a stage with a rising learning rate, and suggest one (arXiv 1506.01186).

The stage trains in a temporary folder, in this process and on one GPU if there is any; the run itself stays untouched.
"""

import math
import tempfile
from typing import Any

from jobs.console import aligned, status, three_digits
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import with_absolute_paths
from pipeline.config.schema import RunConfig
from pipeline.data.storage import Storage
from pipeline.training.callbacks import Callback, Progress, StepEvent
from pipeline.training.checkpoint.committed import is_committed
from pipeline.training.checkpoint.weights import stage_url
from pipeline.training.loop import train
from pipeline.training.prepare import apart

SMOOTHING = 0.9  # of the losses, an exponential average
MIN_POINTS, ROWS = 10, 12
MARGIN = 3.0  # between the rate of the lowest loss and the one to use
LEARNS = 0.02  # relative fall of the smoothed loss below which no rate is suggested


class LossRecorder(Callback):
    """Keeps the learning rate and the loss of every step."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def after_step(self, event: StepEvent) -> None:
        if event.health is not None:
            self.points.append((event.lr, event.health.losses["loss"]))


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
    config, storage, recorder = with_absolute_paths(config), Storage(config.storage), LossRecorder()
    chosen = config.stage_named(stage)
    index, start = config.stages.index(chosen), chosen.start_from
    if start == "previous":
        is_finished = index > 0 and is_committed(storage, stage_url(config, index - 1))
        start = stage_url(config, index - 1) if is_finished else "random"
    rates = {"lr": high, "min_lr": low, "warmup_steps": 0, "lr_schedule": "exponential"}
    optimizer = chosen.optimizer.model_copy(update=rates)
    ramp = chosen.model_copy(update={"optimizer": optimizer, "steps": steps, "start_from": start})
    with tempfile.TemporaryDirectory(prefix="mome-lr-range-") as folder, status("starting") as update:
        scratch = apart(config, storage, folder, config.name)
        sections: dict[str, dict[str, Any]] = {
            "guards": {"health_check_every": 1, "spike": None}, "checkpoint": {"every": steps + 1, "keep_best": None},
            "tracking": {"uri": None, "required": False, "profile": None},
            "evaluation": {"source": None, "every": None},
        }  # fmt: skip
        changed = {name: getattr(scratch, name).model_copy(update=values) for name, values in sections.items()}
        scratch = scratch.model_copy(update={"stages": (ramp,), **changed})

        def report(progress: Progress) -> None:
            update(f"step {progress.stage_step} of {steps}, loss {progress.loss:.4g}")

        try:
            train(scratch, report, callbacks=[recorder])
        except RunFailed:  # the loss is no longer finite
            if len(recorder.points) < MIN_POINTS:
                raise
    result = suggest_rate(recorder.points) | {"stage": chosen.name, "start_from": start}
    return result, _as_text(result, f"stages.{chosen.name}.optimizer.lr")


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
    first, lowest = three_digits(result["first_loss"]), three_digits(result["lowest_loss"])
    verdict = (
        f"the loss falls from {first} to {lowest}, its lowest at {result['lowest_at']:.2g}; a rate {MARGIN:g} times "
        f"below that is a good start:\n  {key}={result['lr']:g}"
        if result["lr"] is not None
        else f"no rate lowers the loss ({first}, at best {lowest}): check data and model.init_std, or raise --lr-steps"
    )
    points = result["points"]
    rows = [points[number * (len(points) - 1) // (ROWS - 1)] for number in range(ROWS)]
    table = [
        ["lr", "loss", "smoothed"],
        *([f"{p['lr']:.2g}", f"{p['loss']:.4g}", f"{p['smoothed']:.4g}"] for p in rows),
    ]
    return f"{verdict}\n\n{aligned(table, right=(0, 1, 2))}"
