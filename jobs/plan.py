"""`mome plan`: estimate what each stage needs on an accelerator, from its own step on a model without memory."""

import difflib
import itertools
import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs.cluster import for_ranks
from jobs.console import check_output, status, write_output
from pipeline.config.errors import ConfigError, MomeError
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from pipeline.pages.charts import Axis, duration
from pipeline.pages.page import render_page
from pipeline.planning import estimate as planning
from pipeline.planning.estimate import Accelerator, Assumptions, Network, StageEstimate, StageSettings
from pipeline.training.deepspeed_engine import sharding_of
from pipeline.training.prepare import VOCABULARY
from pipeline.training.stages import Stage, check_stages
from pipeline.training.workload import work_of

GB, TERA = 1e9, planning.TERA
CATEGORIES = ("states", "gradients", "buffers", "loader", "activations", "backward", "update", "total")
SIZES = tuple(2**k for k in range(11))  # accelerators in the scaling curve: 1 to 1,024
SCALING_KEYS = ("gpus", "samples_per_second", "step_seconds", "micro_batch_size", "fits", "hours", "cost")

CHART = {"width": 900, "left": 90, "top": 50, "right": 200, "bottom": 390}  # of the plot, in pixels
LINE_CHARACTERS, LINE_HEIGHT = 120, 14  # of the assumptions below the plot, at 10 px
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


@dataclass(frozen=True)
class Target:
    """Hardware that the run is planned for, and the assumptions."""

    accelerator: Accelerator
    network: Network
    gpus: int
    assumptions: Assumptions
    text_tokens: int | None = None


@dataclass(frozen=True)
class StagePlan:
    """A stage as configured, what other ZeRO stages would need, and how it scales."""

    chosen: StageEstimate
    assumptions: Assumptions
    by_zero_stage: dict[str, StageEstimate]
    scaling: list[StageEstimate]  # on 1, 2, 4, … accelerators

    def efficiency(self, point: StageEstimate) -> float:
        """Return the speed at a point of the scaling curve, relative to ideal scaling from its first."""
        first = self.scaling[0]
        return point.samples_per_second / point.gpus / (first.samples_per_second / first.gpus)


def plan_command(
    config: RunConfig, accelerator: str, network: str, gpus: int | None, assumptions: Assumptions,
    text_tokens: int | None, scaling: Path | None,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Plan the run; return the plan as JSON and as text, and write the scaling curve to `scaling`."""
    if scaling is not None:
        check_output(Storage(), str(scaling), "--scaling")
    config = for_ranks(config, workers=gpus or config.cluster.workers, min_workers=None)
    options = {"--accelerator": (accelerator, [*planning.ACCELERATORS]), "--network": (network, [*planning.NETWORKS])}
    for option, (name, known) in options.items():
        if name not in known:
            hint = "".join(f"did you mean '{match}'? " for match in difflib.get_close_matches(name, known, n=1))
            raise ConfigError(f"{option} {name}: {hint}known: {', '.join(known)}")
    hardware = planning.ACCELERATORS[accelerator], planning.NETWORKS[network]
    target = Target(*hardware, config.cluster.workers, assumptions, text_tokens)
    with status("planning") as update:
        plans = plan_run(config, target, scaling is not None, update)
    if scaling is not None:
        page = scaling_svg(plans, target, f"{config.name} on {accelerator}, {network}")
        write_output(Storage(), str(scaling), page.encode(), "--scaling")
    return as_json_object(plans, target), as_text(plans, target)


def plan_run(
    config: RunConfig, target: Target, scaling: bool, progress: Callable[[str], None] = lambda _: None
) -> list[StagePlan]:
    """Plan every stage. Raises ConfigError for a config that no model serves, or too many GPUs for its batches."""
    check_stages(config)
    vocabulary = config.tokenizer.size  # the run's own, if this machine has it, else the maximum of the config
    for url in (join(config.folder, VOCABULARY), config.tokenizer.vocabulary):
        if url is not None and is_local(url):
            try:
                vocabulary = Tokenizer.load(Storage(config.storage), url).size
                break
            except (MomeError, OSError):
                continue
    plans = []
    for index, stage in enumerate(config.stages):
        if target.gpus > (batch := stage.global_batch_size):
            raise ConfigError(f"--gpus {target.gpus}: stage {stage.name} has a batch of {batch} rows only")
        progress(f"stage {stage.name}")
        plans.append(_plan_stage(Stage(config, index), vocabulary, target, scaling))
    return plans


def _plan_stage(stage: Stage, vocabulary: int, target: Target, scaling: bool) -> StagePlan:
    engine, assumptions = stage.run.engine, target.assumptions
    sources, read = stage.config.sources, 0.0
    try:  # the mean bytes of the sources' samples, by weight, if all manifests are on this machine
        for name, weight in sources.items():
            url = stage.run.sources[name].shards
            if not is_local(url):
                raise OSError(f"{url} is on another machine")
            shards = load_manifest(Storage(stage.run.storage), url).shards
            read += weight * sum(shard.bytes for shard in shards) / max(1, sum(shard.samples for shard in shards))
        assumptions = replace(assumptions, sample_bytes=read / sum(sources.values()))
    except (MomeError, OSError):
        pass
    checkpointing = {on: stage.with_engine(activation_checkpointing=on) for on in (False, True)}
    works = {on: work_of(variant, vocabulary, "cuda", target.text_tokens) for on, variant in checkpointing.items()}
    num_images = {"text": 0, "regions": 0, "statements": 2}.get(stage.source_type, 1)
    micro_batch_size = None if engine.micro_batch_size == "auto" else engine.micro_batch_size
    batch_size, work = stage.config.global_batch_size, works[engine.activation_checkpointing]
    settings = StageSettings(stage.name, stage.steps, batch_size, num_images, micro_batch_size, work)

    def estimate_at(
        gpus: int, largest: bool = False, recomputed: bool = engine.activation_checkpointing, **keys: Any
    ) -> StageEstimate:
        """Estimate with other keys of the engine, and with the `largest` micro-batch that fits."""
        keys = {"micro_batch_size": micro_batch_size, **keys}
        sharding = sharding_of(stage.with_engine(**keys), gpus, on_cuda=True)
        described, hardware = replace(settings, work=works[recomputed]), (target.accelerator, target.network)
        result = planning.estimate(described, sharding, *hardware, assumptions)
        if largest:
            described = replace(described, micro_batch_size=min(max(1, result.largest_micro_batch), result.share))
            result = planning.estimate(described, sharding, *hardware, assumptions)
        return result

    alternatives = {}  # the table of ZeRO stages: plain, offloaded, recomputed, and both
    for zero, offloaded, recomputed in itertools.product(range(4), (False, True), (False, True)):
        if zero == 0 and (offloaded or engine.precision == "bfloat16"):
            continue  # in bfloat16, DeepSpeed would keep no float32 weights there
        words = [f"ZeRO {zero}", *["offload"] * offloaded, *["recomputed"] * recomputed]
        keys = {"offload_optimizer": offloaded, "offload_parameters": offloaded and zero == 3}
        alternatives[", ".join(words)] = estimate_at(target.gpus, False, recomputed, zero_stage=zero, **keys)
    # 'auto', and the scaling curve, take the largest micro-batch that fits.
    chosen = estimate_at(target.gpus, largest=engine.micro_batch_size == "auto")
    sizes = [gpus for gpus in SIZES if gpus <= batch_size] if scaling else []
    points = [estimate_at(gpus, largest=micro_batch_size is None) for gpus in sizes]
    return StagePlan(chosen, assumptions, alternatives, points)


def as_json_object(plans: list[StagePlan], target: Target) -> dict[str, Any]:
    """Return the numbers of each stage and of the run: most memory, and mean time and arithmetic of a step."""
    chosen, stages = [plan.chosen for plan in plans], []
    steps = [stage.hours / stage.step_seconds for stage in chosen]
    means = {
        key: sum(getattr(stage, key) * n for stage, n in zip(chosen, steps, strict=True)) / sum(steps)
        for key in ("flops_per_step", "step_seconds")
    }
    for plan in plans:
        memory = {"memory": plan.chosen.memory.as_json(), "sample_bytes": plan.assumptions.sample_bytes}
        by_zero_stage = {
            name: {"memory_bytes": alternative.memory.as_json()}
            | {key: getattr(alternative, key) for key in ("fits", "largest_micro_batch", "step_seconds")}
            for name, alternative in plan.by_zero_stage.items()
        }
        scaling = [
            {key: getattr(point, key) for key in SCALING_KEYS} | {"efficiency": plan.efficiency(point)}
            for point in plan.scaling
        ]
        stages.append(asdict(plan.chosen) | memory | {"by_zero_stage": by_zero_stage, "scaling": scaling})
    return means | {
        "parameters": max(stage.parameters.total for stage in chosen),
        "memory_bytes_per_gpu": max(chosen, key=lambda stage: stage.memory.total).memory.as_json(),
        "hours": sum(stage.hours for stage in chosen), "cost": sum(stage.cost for stage in chosen),
        "fits": all(stage.fits for stage in chosen), "accelerator": target.accelerator.name,
        "network": target.network.name, "gpus": target.gpus, "assumptions": asdict(target.assumptions),
        "stages": stages,
    }  # fmt: skip


def as_text(plans: list[StagePlan], target: Target) -> str:
    """Return the plan as text: every stage with its table of ZeRO stages, the run's time and cost, the assumptions."""
    lines = []
    room = plans[0].chosen.usable_bytes / GB
    heading = f"  GB of each GPU, {room:,.1f} usable{' ' * 8}{''.join(f'{name:>12}' for name in CATEGORIES)}"
    for plan in plans:
        stage = plan.chosen
        size = f"{stage.parameters.total / 1e6:,.1f} M parameters, {stage.parameters.trained / 1e6:,.1f} M trained"
        rows = f"{stage.gpus} GPUs x {stage.accumulation} x {stage.micro_batch_size} rows"
        lines.append(f"stage {stage.name}: {size}; {rows}")
        properties = {
            "step": f"{stage.step_seconds * 1000:,.0f} ms: arithmetic {stage.compute_seconds * 1000:,.0f}, "
            f"communication {stage.communication_seconds * 1000:,.0f} "
            f"({stage.communication_bytes / GB:,.2f} GB sent by each GPU)",
            "arithmetic": f"{stage.flops_per_step / TERA:,.1f} TFLOP, {stage.tokens_per_step:,.0f} tokens a step",
            "speed": f"{stage.samples_per_second:,.0f} samples/s",
            "needs": f"{stage.storage_bytes_per_second / GB:,.2f} GB/s of storage, "
            f"{stage.loader_cores:,.0f} cores to prepare",
            "checkpoint": f"{stage.checkpoint_bytes / GB:,.2f} GB, {duration(stage.checkpoint_seconds)} to the store",
            "time": f"{stage.hours:,.1f} h" + (f", cost {stage.cost:,.0f}" if target.assumptions.price else ""),
        }
        lines += [f"  {name:<10}  {value}" for name, value in properties.items()]
        lines.append(f"{heading}  largest micro-batch")
        for name, alternative in {"as configured": stage, **plan.by_zero_stage}.items():
            memory = alternative.memory.as_json()
            values = "".join(f"{memory[category] / GB:>12,.2f}" for category in CATEGORIES)
            largest = f"{alternative.largest_micro_batch or 'none fits'}"
            if alternative.largest_micro_batch and not alternative.fits:
                largest += f"; {alternative.micro_batch_size} do not fit"
            lines.append(f"  {name:<36}{values}  {largest}")
        if plan.scaling:
            lines.append("  GPUs   samples/s   efficiency   step ms   micro-batch       hours        cost")
        lines += [
            f"  {point.gpus:>4}{point.samples_per_second:>12,.0f}{plan.efficiency(point):>12.0%}"
            f"{point.step_seconds * 1000:>11,.0f}{point.micro_batch_size:>14}{point.hours:>12,.1f}{point.cost:>12,.0f}"
            + ("" if point.fits else "  does not fit")
            for point in plan.scaling
        ]
        lines.append("")
    hours, cost = (sum(getattr(plan.chosen, name) for plan in plans) for name in ("hours", "cost"))
    priced = f", cost {cost:,.0f}" if target.assumptions.price else " (give --price for a cost)"
    lines += [f"all stages: {hours:,.1f} h on {target.gpus} x {target.accelerator.name}{priced}", "", "assumed:"]
    return "\n".join([*lines, *(f"  {line}" for line in _assumption_lines(plans, target))])


def _assumption_lines(plans: list[StagePlan], target: Target) -> list[str]:
    accelerator, network = target.accelerator, target.network
    known = {plan.assumptions.sample_bytes for plan in plans}
    assumptions = {name: f"{value:g}" for name, value in asdict(target.assumptions).items()}
    assumptions["sample_bytes"] = " or ".join(f"{size:,.0f}" for size in sorted(known))
    return [
        f"{accelerator.name}: {accelerator.flops / TERA:,.0f} TFLOPS dense bfloat16, "
        f"{accelerator.memory_bytes / GB:,.0f} GB, {accelerator.per_node} a node, joined inside it at "
        f"{accelerator.inside_bandwidth / GB:,.0f} GB/s x {planning.INTRA_EFFICIENCY}",
        f"{network.name}: {network.bandwidth / GB:,.2f} GB/s for each GPU x {network.efficiency}, "
        f"{network.latency * 1e6:.0f} us",
        *(f"{name} {value}" for name, value in assumptions.items()),
        "texts as long as the stage allows, unless --text-tokens says otherwise",
        f"{planning.CONTEXT_BYTES / GB} GB for CUDA and NCCL",
    ]


def scaling_svg(plans: list[StagePlan], target: Target, title: str) -> str:
    """Draw the stages' scaling curves as one SVG; dashed lines are ideal scaling, and hollow points do not fit."""
    width, left, top, right, bottom = CHART.values()
    points = [point for plan in plans for point in plan.scaling]
    speeds = [point.samples_per_second for point in points]
    ideals = [plan.scaling[0].samples_per_second * plan.scaling[-1].gpus for plan in plans]
    low, high = min(speeds) / 1.5, max(*speeds, *ideals) * 1.2
    x_of = Axis(1, max(2, *(point.gpus for point in points)), left, width - right, is_logarithmic=True)
    y_of = Axis(low, max(high, low * 2), bottom, top, is_logarithmic=True)
    assumed = ["assumed:", *_assumption_lines(plans, target)]
    lines = [part for line in assumed for part in textwrap.wrap(line, LINE_CHARACTERS)]
    powers = range(math.ceil(math.log10(y_of.low)), math.floor(math.log10(y_of.high)) + 1)
    return render_page(
        "jobs/scaling.svg.j2", subject=title, title=title,
        plans=list(zip(plans, itertools.cycle(COLOURS), strict=False)),
        lines=[(bottom + 55 + LINE_HEIGHT * row, line) for row, line in enumerate(lines)],
        height=bottom + 65 + LINE_HEIGHT * len(lines),
        x_of=x_of, x_ticks=[2**n for n in range(int(math.log2(x_of.high)) + 1)],
        y_of=y_of, y_ticks=[10.0**power for power in powers],
        **CHART,
    )  # fmt: skip
