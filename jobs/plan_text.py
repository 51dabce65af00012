"""`mome plan` for a person: a table for each stage, and the assumptions that all of it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from jobs.plan import StagePlan, Target
from pipeline.pages.formatting import duration
from pipeline.planning.estimate import CONTEXT_BYTES, Point, StageEstimate, usable_bytes
from pipeline.planning.hardware import INTRA_EFFICIENCY, TERA

GB = 1e9
CATEGORIES = ("states", "gradients", "buffers", "loader", "activations", "backward", "update", "total")


def as_text(plans: list[StagePlan], target: Target) -> str:
    lines = [line for plan in plans for line in _stage(plan, target)]
    hours, cost = (sum(getattr(plan.chosen, name) for plan in plans) for name in ("hours", "cost"))
    priced = f", cost {cost:,.0f}" if target.assumptions.price else " (give --price for a cost)"
    lines.append(f"all stages: {hours:,.1f} h on {target.gpus} x {target.accelerator.name}{priced}")
    return "\n".join([*lines, "", *assumptions_of(plans, target)])


def _stage(plan: StagePlan, target: Target) -> Iterator[str]:
    one = plan.chosen
    yield (
        f"stage {one.name}: {one.parameters.total / 1e6:,.1f} M parameters, {one.parameters.trained / 1e6:,.1f} M "
        f"trained; {one.gpus} GPUs x {one.accumulation} x {one.micro_batch_size} rows"
    )
    rows = {
        "step": f"{one.step_seconds * 1000:,.0f} ms: arithmetic {one.compute_seconds * 1000:,.0f}, communication "
        f"{one.communication_seconds * 1000:,.0f} ({one.communication_bytes / GB:,.2f} GB sent by each GPU)",
        "arithmetic": f"{one.flops_per_step / TERA:,.1f} TFLOP a step, {one.tokens_per_step:,.0f} tokens a step",
        "speed": f"{one.samples_per_second:,.0f} samples/s",
        "needs": f"{one.storage_bytes_per_second / GB:,.2f} GB/s of storage, {one.loader_cores:,.0f} cores to prepare",
        "checkpoint": f"{one.checkpoint_bytes / GB:,.2f} GB, {duration(one.checkpoint_seconds)} to the store",
        "time": f"{one.hours:,.1f} h" + (f", cost {one.cost:,.0f}" if target.assumptions.price else ""),
    }
    yield from (f"  {name:<10}  {told}" for name, told in rows.items())
    yield from _memory(plan, target)
    if plan.scaling:
        yield from _scaling(plan.scaling)
    yield ""


def _memory(plan: StagePlan, target: Target) -> Iterator[str]:
    room = usable_bytes(target.accelerator, target.assumptions) / GB
    yield (
        f"  GB of each GPU, {room:,.1f} usable"
        + " " * 8
        + "".join(f"{name:>12}" for name in CATEGORIES)
        + "  largest micro-batch"
    )
    for name, each in {"as configured": plan.chosen, **plan.by_zero_stage}.items():
        values = "".join(f"{each.memory.as_json()[category] / GB:>12,.2f}" for category in CATEGORIES)
        yield f"  {name:<36}{values}  {_fit(each)}"


def _fit(each: StageEstimate) -> str:
    if not each.largest_micro_batch:
        return "none fits"
    return f"{each.largest_micro_batch}" + ("" if each.fits else f"; {each.micro_batch_size} do not fit")


def _scaling(points: list[Point]) -> Iterator[str]:
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
        told = " or ".join(f"{each:,.0f}" for each in sorted(known)) if name == "sample_bytes" else f"{value:g}"
        yield f"  {name} {told}"
    yield "  texts as long as the stage allows, unless --text-tokens says otherwise"
    yield f"  {CONTEXT_BYTES / GB} GB for CUDA and NCCL"
