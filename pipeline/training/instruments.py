"""What a stage reads of itself at its metric steps: losses, speed, ranks and data, over the whole batch or all ranks.

Reading is a collective call, and the only place besides `look` where a step waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.data.loading.loader import Loader
from pipeline.training.alerts import Reading, rank_metrics, sign_metrics
from pipeline.training.collectives import Collectives
from pipeline.training.progress import Meter, Speed
from pipeline.training.steps import TrainingStep
from pipeline.training.utilisation import seconds_at_peak


@dataclass(frozen=True)
class Readings:
    """The same on every rank, but for the speed, which is this rank's."""

    losses: dict[str, float]  # of the global batch: `loss`, and each objective's
    points: dict[str, float]  # all there is to record, under MLflow's names
    speed: Speed
    ranks: Reading  # what alerts are judged by


class Instruments:
    """Of one stage, from step `start` on."""

    def __init__(self, config: RunConfig, index: int, loader: Loader, collectives: Collectives, vocabulary: int):
        self.stage, self.first = config.stages[index], config.stage_start(index)
        self.collectives = collectives
        self.counted_before: dict[str, float] = {}  # the data's counts in the checkpoint that the stage goes on from
        self._loader = loader
        self._meter = Meter(self.stage.global_batch_size, 0, loader)
        self._seconds_at_peak = seconds_at_peak(config, index, vocabulary, collectives)

    def begin(self, step: int) -> None:
        """Speed is measured from here: at the start, and after what was no training. `step` counts steps done."""
        self._meter = Meter(self.stage.global_batch_size, step, self._loader)

    def read(self, step: int, trained: TrainingStep, losses: dict[str, Tensor]) -> Readings:
        """Of the stage's step `step`, in which `trained` gave this rank's `losses`."""
        speed = self._meter.read(step + 1)
        summed, ranks = self._summed(step, trained, losses, speed)
        points = {("train/loss" if name == "loss" else f"train/loss_{name}"): value for name, value in summed.items()}
        points |= self._losses_by_source(trained)
        points |= sign_metrics(ranks.signs) | rank_metrics(ranks)
        points |= {"perf/samples_per_s": speed.samples_per_second, "perf/data_wait_share": speed.wait_share}
        points |= {"perf/samples_per_s_per_gpu": speed.samples_per_second / self.collectives.world_size}
        if self._seconds_at_peak is not None:
            points["perf/mfu"] = speed.steps_per_second * self._seconds_at_peak
        points |= {"samples_seen": float((step + 1) * self.stage.global_batch_size)}
        return Readings(summed, points | self.data_counts(), speed, ranks)

    def data_counts(self) -> dict[str, float]:
        """The loaders' counters, over all ranks and all sessions of the stage. A collective call."""
        counts = self._loader.counts()
        names = sorted(counts)
        values = [float(counts[n]) for n in names]  # float32 would count no further than 2^24
        summed = self.collectives.sum(torch.tensor(values, dtype=torch.float64, device=self.collectives.device))
        read = {f"data/{name}": value for name, value in zip(names, summed.tolist(), strict=True)}
        # Epochs follow from the step; what was read and found bad before a restart only its checkpoint knows.
        before = {name: value for name, value in self.counted_before.items() if not name.startswith("data/epochs/")}
        return {name: value + before.get(name, 0.0) for name, value in read.items()}

    def _summed(
        self, step: int, trained: TrainingStep, losses: dict[str, Tensor], speed: Speed
    ) -> tuple[dict[str, float], Reading]:
        """The global batch's losses by name, and what the alerts are judged by, from one sum over the ranks."""
        names, signs = sorted(losses), sorted(trained.signs)
        parts = [losses[name].float() for name in names] + [trained.signs[name].float() for name in signs]
        by_rank = torch.zeros(2, self.collectives.world_size, device=self.collectives.device)
        by_rank[:, self.collectives.rank] = torch.tensor([speed.wait_share, trained.pace.read()])
        summed = self.collectives.sum(torch.cat([torch.stack(parts), by_rank.flatten()])).tolist()
        of_ranks, world_size = summed[len(parts) :], self.collectives.world_size
        told = dict(zip(signs, summed[len(names) : len(parts)], strict=True))
        warm = step >= self.stage.optimizer.warmup_steps
        reading = Reading(self.first + step + 1, warm, told, of_ranks[:world_size], of_ranks[world_size:])
        return dict(zip(names, summed[: len(names)], strict=True)), reading

    def _losses_by_source(self, trained: TrainingStep) -> dict[str, float]:
        """Each source's mean over its own rows, where the stage mixes sources."""
        if not trained.by_source:
            return {}
        objectives, names = sorted(trained.by_source), sorted(self.stage.sources)
        own = torch.stack([trained.by_source[each] for each in objectives])
        found = zip(objectives, self.collectives.sum(own).tolist(), strict=True)
        return {
            f"train/{name}/loss_{objective}": total / count
            for objective, sources in found
            for name, (total, count) in zip(names, sources, strict=True)
            if count  # a source may have no row in a batch
        }
