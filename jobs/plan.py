"""`mome plan`: what a run will need on a named accelerator and network, stage by stage, before anything is started.

It runs the stages' own training step on models without memory (`pipeline.training.workload`), and puts the result on
the hardware's data sheets (`pipeline.planning`). Neither data nor a cluster is needed; a manifest on this machine
replaces the assumed bytes of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jobs.console import status
from jobs.distributed import with_workers
from jobs.output import check_output, write_output
from pipeline.config.errors import ConfigError, MomeError
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig, StageConfig
from pipeline.config.urls import is_local
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from pipeline.pages.formatting import duration
from pipeline.planning.estimate import (
    CONTEXT_BYTES,
    Assumptions,
    Point,
    StageEstimate,
    StageSettings,
    curve,
    estimate,
    usable_bytes,
)
from pipeline.planning.hardware import (
    ACCELERATORS,
    INTRA_EFFICIENCY,
    NETWORKS,
    TERA,
    Accelerator,
    Network,
    hardware_named,
)
from pipeline.training.deepspeed_setup import sharding_of
from pipeline.training.prepare import VOCABULARY
from pipeline.training.stages import Stage, check_stages
from pipeline.training.workload import work_of

Say = Callable[[str], None]
ZERO_STAGES = (0, 1, 2, 3)
GB = 1e9
CATEGORIES = ("states", "gradients", "buffers", "loader", "activations", "backward", "update", "total")


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
    scaling: list[Point]


def plan_command(
    path: Path,
    overrides: list[str],
    accelerator: str,
    network: str,
    gpus: int | None,
    price: float | None,
    assumptions: Assumptions,
    text_tokens: int | None,
    scaling: Path | None,
) -> tuple[dict[str, Any], str]:
    """Plan the config at `path`; return the plan as JSON and as text, and write the scaling curve to `scaling`."""
    from jobs.plan_chart import scaling_svg

    config = load_config(path, overrides)
    if scaling is not None:
        check_output(Storage(), str(scaling), "--scaling")
    assumptions = replace(assumptions, price=config.cluster.price if price is None else price)
    config = with_workers(config, gpus or config.cluster.workers)
    hardware = hardware_named("--accelerator", ACCELERATORS, accelerator)
    interconnect = hardware_named("--network", NETWORKS, network)
    target = Target(hardware, interconnect, config.cluster.workers, assumptions, text_tokens)
    with status("planning") as update:
        plans = plan_run(config, target, scaling is not None, update)
    if scaling is not None:
        title = f"{config.name} on {hardware.name}, {interconnect.name}"
        write_output(Storage(), str(scaling), scaling_svg(plans, target, title).encode(), "--scaling")
    return as_json_object(plans, target), as_text(plans, target)


def plan_run(config: RunConfig, target: Target, scaling: bool, say: Say = lambda _: None) -> list[StagePlan]:
    """Every stage's plan. Raises ConfigError for a config that no model serves, or too many GPUs for its batches."""
    check_stages(config)
    plans = []
    for index, stage in enumerate(config.stages):
        if target.gpus > stage.global_batch_size:
            raise ConfigError(
                f"--gpus {target.gpus}: stage {stage.name} has a batch of {stage.global_batch_size} rows only"
            )
        say(f"stage {stage.name}")
        plans.append(_plan_stage(config, index, target, scaling))
    return plans


def _plan_stage(config: RunConfig, index: int, target: Target, scaling: bool) -> StagePlan:
    stage, vocabulary = Stage(config, index), _vocabulary(config)
    works = {
        recomputed: work_of(
            stage.with_engine(activation_checkpointing=recomputed), vocabulary, "cuda", target.text_tokens
        )
        for recomputed in (False, True)
    }
    assumptions = _with_known_bytes(config, stage.config, target.assumptions)
    micro = config.engine.micro_batch_size
    described = StageSettings(
        name=stage.name,
        steps=stage.steps,
        global_batch_size=stage.config.global_batch_size,
        images={"text": 0, "regions": 0, "statements": 2}.get(stage.source_type, 1),
        micro_batch_size=None if micro == "auto" else micro,
        work=works[config.engine.activation_checkpointing],
    )

    def at(gpus: int, largest: bool = False, recomputed: bool | None = None, **engine: Any) -> StageEstimate:
        settings = {"micro_batch_size": described.micro_batch_size, **engine}
        sharding = sharding_of(stage.with_engine(**settings), gpus, on_cuda=True)
        stage_settings = described if recomputed is None else replace(described, work=works[recomputed])
        result = estimate(stage_settings, sharding, target.accelerator, target.network, assumptions)
        if not largest:
            return result
        most = min(max(1, result.largest_micro_batch), result.share)
        return estimate(stage_settings, sharding, target.accelerator, target.network, assumptions, most)

    others = {name: at(target.gpus, **engine) for name, engine in _alternatives(config)}
    # 'auto', and the scaling curve, take the largest micro-batch that fits.
    chosen = at(target.gpus, largest=micro == "auto")
    takes_largest = described.micro_batch_size is None
    points = curve(lambda gpus: at(gpus, largest=takes_largest), described.global_batch_size) if scaling else []
    return StagePlan(chosen, assumptions, others, points)


def _alternatives(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Other settings of the engine, by what the table calls them: plain, offloaded, recomputed, and both."""
    for zero in ZERO_STAGES:
        if zero == 0 and config.engine.precision == "bfloat16":
            continue  # DeepSpeed would keep no float32 weights there
        for offloaded in (False, True) if zero else (False,):
            for recomputed in (False, True):
                words = [f"ZeRO {zero}", *["offload"] * offloaded, *["recomputed"] * recomputed]
                keys = {"offload_optimizer": offloaded, "offload_parameters": offloaded and zero == 3}
                yield ", ".join(words), {"zero_stage": zero, "recomputed": recomputed, **keys}


def _vocabulary(config: RunConfig) -> int:
    """Return the size of the run's own vocabulary if this machine has it, else the maximum of the config."""
    for url in (join(config.folder, VOCABULARY), config.tokenizer.vocabulary):
        if url is not None and is_local(url):
            try:
                return Tokenizer.load(Storage(config.storage), url).size
            except (MomeError, OSError):
                continue
    return config.tokenizer.size


def _with_known_bytes(config: RunConfig, stage: StageConfig, assumptions: Assumptions) -> Assumptions:
    """The mean bytes of the sources' samples, by their weights, where all of their manifests lie on this machine."""
    read = weights = 0.0
    for name, weight in stage.sources.items():
        url = config.sources[name].shards
        if not is_local(url):
            return assumptions
        try:
            shards = load_manifest(Storage(config.storage), url).shards
        except (MomeError, OSError):
            return assumptions
        read += weight * sum(shard.bytes for shard in shards) / max(1, sum(shard.samples for shard in shards))
        weights += weight
    return replace(assumptions, sample_bytes=read / weights)


def as_json_object(plans: list[StagePlan], target: Target) -> dict[str, Any]:
    """The numbers of the run, and of each stage.

    Of the run: memory is that of the stage which needs most, and a step's time and arithmetic are means over its steps.
    """
    chosen = [plan.chosen for plan in plans]
    steps = [stage.hours / stage.step_seconds for stage in chosen]
    total = sum(steps)
    most = max(chosen, key=lambda stage: stage.memory.total)
    return {
        "parameters": max(stage.parameters.total for stage in chosen),
        "flops_per_step": sum(stage.flops_per_step * n for stage, n in zip(chosen, steps, strict=True)) / total,
        "memory_bytes_per_gpu": most.memory.as_json(),
        "step_seconds": sum(stage.step_seconds * n for stage, n in zip(chosen, steps, strict=True)) / total,
        "hours": sum(stage.hours for stage in chosen),
        "cost": sum(stage.cost for stage in chosen),
        "fits": all(stage.fits for stage in chosen),
        "accelerator": target.accelerator.name,
        "network": target.network.name,
        "gpus": target.gpus,
        "assumptions": asdict(target.assumptions),
        "stages": [_stage_json(plan) for plan in plans],
    }


def _stage_json(plan: StagePlan) -> dict[str, Any]:
    summary = asdict(plan.chosen) | {
        "memory": plan.chosen.memory.as_json(),
        "sample_bytes": plan.assumptions.sample_bytes,
    }
    others = {
        name: {
            "memory_bytes": alternative.memory.as_json(),
            "fits": alternative.fits,
            "largest_micro_batch": alternative.largest_micro_batch,
        }
        | {"step_seconds": alternative.step_seconds}
        for name, alternative in plan.by_zero_stage.items()
    }
    return summary | {"by_zero_stage": others, "scaling": [asdict(point) for point in plan.scaling]}


def as_text(plans: list[StagePlan], target: Target) -> str:
    lines = [line for plan in plans for line in _stage_lines(plan, target)]
    hours, cost = (sum(getattr(plan.chosen, name) for plan in plans) for name in ("hours", "cost"))
    priced = f", cost {cost:,.0f}" if target.assumptions.price else " (give --price for a cost)"
    lines.append(f"all stages: {hours:,.1f} h on {target.gpus} x {target.accelerator.name}{priced}")
    return "\n".join([*lines, "", *assumptions_of(plans, target)])


def _stage_lines(plan: StagePlan, target: Target) -> Iterator[str]:
    stage = plan.chosen
    yield (
        f"stage {stage.name}: {stage.parameters.total / 1e6:,.1f} M parameters, {stage.parameters.trained / 1e6:,.1f} "
        f"M trained; {stage.gpus} GPUs x {stage.accumulation} x {stage.micro_batch_size} rows"
    )
    rows = {
        "step": f"{stage.step_seconds * 1000:,.0f} ms: arithmetic {stage.compute_seconds * 1000:,.0f}, communication "
        f"{stage.communication_seconds * 1000:,.0f} ({stage.communication_bytes / GB:,.2f} GB sent by each GPU)",
        "arithmetic": f"{stage.flops_per_step / TERA:,.1f} TFLOP a step, {stage.tokens_per_step:,.0f} tokens a step",
        "speed": f"{stage.samples_per_second:,.0f} samples/s",
        "needs": f"{stage.storage_bytes_per_second / GB:,.2f} GB/s of storage, "
        f"{stage.loader_cores:,.0f} cores to prepare",
        "checkpoint": f"{stage.checkpoint_bytes / GB:,.2f} GB, {duration(stage.checkpoint_seconds)} to the store",
        "time": f"{stage.hours:,.1f} h" + (f", cost {stage.cost:,.0f}" if target.assumptions.price else ""),
    }
    yield from (f"  {name:<10}  {value}" for name, value in rows.items())
    yield from _memory_lines(plan, target)
    if plan.scaling:
        yield from _scaling_lines(plan.scaling)
    yield ""


def _memory_lines(plan: StagePlan, target: Target) -> Iterator[str]:
    room = usable_bytes(target.accelerator, target.assumptions) / GB
    yield (
        f"  GB of each GPU, {room:,.1f} usable"
        + " " * 8
        + "".join(f"{name:>12}" for name in CATEGORIES)
        + "  largest micro-batch"
    )
    for name, alternative in {"as configured": plan.chosen, **plan.by_zero_stage}.items():
        values = "".join(f"{alternative.memory.as_json()[category] / GB:>12,.2f}" for category in CATEGORIES)
        largest = f"{alternative.largest_micro_batch or 'none fits'}"
        if alternative.largest_micro_batch and not alternative.fits:
            largest += f"; {alternative.micro_batch_size} do not fit"
        yield f"  {name:<36}{values}  {largest}"


def _scaling_lines(points: list[Point]) -> Iterator[str]:
    yield "  GPUs   samples/s   efficiency   step ms   micro-batch       hours        cost"
    for point in points:
        yield (
            f"  {point.gpus:>4}{point.samples_per_second:>12,.0f}{point.efficiency:>12.0%}"
            f"{point.step_seconds * 1000:>11,.0f}{point.micro_batch_size:>14}{point.hours:>12,.1f}{point.cost:>12,.0f}"
            + ("" if point.fits else "  does not fit")
        )


def assumptions_of(plans: list[StagePlan], target: Target) -> Iterator[str]:
    accelerator, network = target.accelerator, target.network
    yield "assumed:"
    yield (
        f"  {accelerator.name}: {accelerator.flops / TERA:,.0f} TFLOPS dense bfloat16, "
        f"{accelerator.memory_bytes / GB:,.0f} GB, {accelerator.per_node} a node, joined inside it at "
        f"{accelerator.inside_bandwidth / GB:,.0f} GB/s x {INTRA_EFFICIENCY}"
    )
    speed = f"{network.bandwidth / GB:,.2f} GB/s for each GPU x {network.efficiency}"
    yield f"  {network.name}: {speed}, {network.latency * 1e6:.0f} us"
    known = {plan.assumptions.sample_bytes for plan in plans}
    for name, value in asdict(target.assumptions).items():
        shown = " or ".join(f"{size:,.0f}" for size in sorted(known)) if name == "sample_bytes" else f"{value:g}"
        yield f"  {name} {shown}"
    yield "  texts as long as the stage allows, unless --text-tokens says otherwise"
    yield f"  {CONTEXT_BYTES / GB} GB for CUDA and NCCL"
