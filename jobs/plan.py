"""`mome plan`: estimate what each stage needs on an accelerator, from its own step on a model without memory."""

import difflib
import itertools
import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.cluster import for_ranks
from jobs.console import aligned, check_output, short_time, status, three_digits, with_prefix, write_output
from pipeline.config.errors import ConfigError, MomeError
from pipeline.config.schema import RunConfig
from pipeline.config.urls import is_local
from pipeline.data.contents.text import Tokenizer
from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage, join
from pipeline.pages.charts import Axis
from pipeline.pages.page import render_page
from pipeline.planning import estimate as planning
from pipeline.planning.estimate import Accelerator, Assumptions, Network, StageEstimate, StageSettings
from pipeline.training.deepspeed_engine import sharding_of
from pipeline.training.prepare import VOCABULARY
from pipeline.training.stages import Stage, check_stages
from pipeline.training.workload import work_of

GB, TERA = 1e9, planning.TERA
EFFICIENT = 0.7  # scaling efficiency below which more GPUs are not recommended
ALIKE = 0.02  # relative difference of times that is smaller than the assumptions' errors
LINE = 80  # characters
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
    estimate_at: Callable[..., StageEstimate]  # (gpus, largest, recomputed, keys of the engine)

    def efficiency(self, point: StageEstimate) -> float:
        """Return the speed at a point of the scaling curve, relative to ideal scaling from its first."""
        first = self.scaling[0]
        return point.samples_per_second / point.gpus / (first.samples_per_second / first.gpus)


@dataclass(frozen=True)
class RunEstimate:
    """All stages of the run on a number of accelerators, with the same settings of the engine."""

    stages: list[StageEstimate]
    engine: dict[str, Any] = field(default_factory=dict)  # keys that differ from the config

    @property
    def gpus(self) -> int:
        return self.stages[0].gpus

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def cost(self) -> float:
        return sum(stage.cost for stage in self.stages)

    @property
    def fits(self) -> bool:
        return all(stage.fits for stage in self.stages)

    def efficiency(self, other: "RunEstimate") -> float:
        """Return this estimate's speed per accelerator, relative to another's."""
        return other.gpus * other.hours / (self.gpus * self.hours)


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
        plans = plan_run(config, target, update)
    if scaling is not None:
        page = scaling_svg(plans, target, f"{config.name} on {accelerator}, {network}")
        write_output(Storage(), str(scaling), page.encode(), "--scaling")
    advised = recommend(config, plans, target)
    chosen = (
        None
        if advised is None
        else {"gpus": advised.gpus, **advised.engine, "hours": advised.hours, "cost": advised.cost}
    )
    result = as_json_object(plans, target) | {"recommended": chosen}
    return result, as_text(config, plans, target, with_scaling=scaling is not None)


def plan_run(config: RunConfig, target: Target, progress: Callable[[str], None] = lambda _: None) -> list[StagePlan]:
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
        plans.append(_plan_stage(Stage(config, index), vocabulary, target))
    return plans


def _plan_stage(stage: Stage, vocabulary: int, target: Target) -> StagePlan:
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
    for name, keys in engine_alternatives(stage.run).items():
        keys = {key: value for key, value in keys.items() if key != "activation_checkpointing"}
        alternatives[name] = estimate_at(target.gpus, False, "recomputed" in name, **keys)
    # 'auto', and the scaling curve, take the largest micro-batch that fits.
    chosen = estimate_at(target.gpus, largest=engine.micro_batch_size == "auto")
    sizes = [gpus for gpus in SIZES if gpus <= batch_size]
    points = [estimate_at(gpus, largest=micro_batch_size is None) for gpus in sizes]
    return StagePlan(chosen, assumptions, alternatives, points, estimate_at)


def engine_alternatives(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return keys of the engine by name: each ZeRO stage plain, with offload, with recomputed activations, and both."""
    alternatives = {}
    for zero, offloaded, recomputed in itertools.product(range(4), (False, True), (False, True)):
        if (zero == 0 and (offloaded or config.engine.precision == "bfloat16")) or (
            zero == 3 and config.engine.compile
        ):
            continue  # the schema's COMBINATIONS
        name = ", ".join([f"ZeRO {zero}", *["offload"] * offloaded, *["recomputed"] * recomputed])
        keys = {"offload_optimizer": offloaded, "offload_parameters": offloaded and zero == 3}
        alternatives[name] = {"zero_stage": zero, **keys, "activation_checkpointing": recomputed}
    return alternatives


def recommend(config: RunConfig, plans: list[StagePlan], target: Target) -> RunEstimate | None:
    """Return the fastest settings that fit, on the planned number of GPUs or on fewer; None if nothing fits.

    The planned number of GPUs is kept if its efficiency is at least `EFFICIENT` of the best; otherwise the largest
    power of two with that efficiency is used. Offload comes last, because its transfers are not estimated. Then the
    shortest time decides, and of times within `ALIKE` no recomputation and the lowest ZeRO stage.
    """
    curve = run_curve(plans)
    planned = RunEstimate([plan.chosen for plan in plans])
    fitting = [run for run in (*curve, planned) if run.fits] or [planned]
    best = max(fitting, key=lambda run: 1 / (run.gpus * run.hours))
    efficient = [run.gpus for run in fitting if run.efficiency(best) >= EFFICIENT]
    gpus = target.gpus if target.gpus in efficient or not planned.fits else max(efficient)
    results: list[tuple[tuple[bool, int, bool, int], RunEstimate]] = []
    for keys in engine_alternatives(config).values():
        engine = {key: value for key, value in keys.items() if key != "activation_checkpointing"}
        recomputed = keys["activation_checkpointing"]
        stages = [plan.estimate_at(gpus, True, recomputed, **engine) for plan in plans]
        limits = [stage.largest_micro_batch for stage in stages if stage.largest_micro_batch < stage.share]
        rows = min(limits, default=max(stage.share for stage in stages))
        if rows:
            run = RunEstimate(stages, {**keys, "micro_batch_size": rows})
            order = keys["offload_optimizer"], round(math.log(run.hours, 1 + ALIKE)), recomputed, keys["zero_stage"]
            results.append((order, run))
    return min(results, key=lambda result: result[0])[1] if results else None


def run_curve(plans: list[StagePlan]) -> list[RunEstimate]:
    """Return the whole run on 1, 2, 4, … accelerators, as far as every stage's batch allows."""
    return [RunEstimate(list(points)) for points in zip(*(plan.scaling for plan in plans), strict=False)]


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


def as_text(config: RunConfig, plans: list[StagePlan], target: Target, with_scaling: bool = False) -> str:
    """Return the plan as text of at most 80 columns: the verdict, a table of the stages, the details of each with its
    table of ZeRO stages, and the assumptions.
    """
    planned, is_priced = RunEstimate([plan.chosen for plan in plans]), bool(target.assumptions.price)
    lines = _verdict(config, plans, target)
    table = [["stage", "trained", "rows", "step", "samples/s", "GB/GPU", "time", *["cost"] * is_priced]]
    for stage in planned.stages:
        rows, step = f"{stage.micro_batch_size}", short_time(stage.step_seconds)
        rows += f" x {stage.accumulation}" if stage.accumulation > 1 else ""
        speed, size = three_digits(stage.samples_per_second), f"{three_digits(stage.parameters.trained / 1e6)} M"
        cells = [_short(stage.name), size, rows, step, speed, three_digits(stage.memory.total / GB)]
        table.append([*cells, short_time(stage.hours * 3600), *[_cost(stage.cost)] * is_priced])
    table.append(["all", *[""] * 5, short_time(planned.hours * 3600), *[_cost(planned.cost)] * is_priced])
    lines += ["", aligned(table, right=range(1, len(table[0])))]
    if with_scaling:
        curve = run_curve(plans)
        columns = [_short(plan.chosen.name) for plan in plans[:3]]  # more would not fit into a line
        table = [["GPUs", "efficiency", "time", *["cost"] * is_priced, *columns, ""]]
        for number, run in enumerate(curve):
            cells = [f"{run.gpus:,}", f"{run.efficiency(curve[0]):.0%}", short_time(run.hours * 3600)]
            steps = [short_time(plan.scaling[number].step_seconds) for plan in plans[: len(columns)]]
            cells += [*[_cost(run.cost)] * is_priced, *steps, "" if run.fits else "does not fit"]
            table.append(cells)
        lines += ["", "All stages on more GPUs, and the time of a step of each:"]
        lines.append(aligned(table, right=range(len(table[0]) - 1)))
    for plan in plans:
        lines += ["", *_stage_details(plan)]
    lines += ["", "Assumptions, which the options of `mome plan` change:"]
    wrapped = textwrap.wrap("; ".join(_assumption_lines(plans, target)), LINE, break_on_hyphens=False)
    return "\n".join([*lines, *wrapped])


def _verdict(config: RunConfig, plans: list[StagePlan], target: Target) -> list[str]:
    """Return the result in sentences: time and cost as configured and on another number of GPUs, and what to set."""
    planned, advised = RunEstimate([plan.chosen for plan in plans]), recommend(config, plans, target)

    def figures(run: RunEstimate) -> str:
        return short_time(run.hours * 3600) + (f", cost {_cost(run.cost)}" if target.assumptions.price else "")

    def sentence(run: RunEstimate) -> str:
        return f"{run.gpus:,} GPU{'s' * (run.gpus > 1)}: {figures(run)}"

    text, unfit = sentence(planned), [stage for stage in planned.stages if not stage.fits]
    others = [run for run in run_curve(plans) if run.gpus == (8 if planned.gpus > 8 else 4 * planned.gpus)]
    if advised is not None and advised.gpus != planned.gpus:
        others = [advised]
    if unfit:
        needs = ", ".join(f"stage {stage.name} needs {three_digits(stage.memory.total / GB)} GB" for stage in unfit)
        text = f"Does not fit as configured: {needs} of the {three_digits(unfit[0].usable_bytes / GB)} GB of a GPU"
    elif others:
        small, large = sorted((planned, others[0]), key=lambda run: run.gpus)
        text = f"{sentence(small)}; {sentence(large)}: scaling efficiency {large.efficiency(small) * 100:.0f} %"
    lines = textwrap.wrap(f"{text}.", LINE)
    if advised is None:
        return [*lines, "Nothing fits: use GPUs with more memory, a smaller model or shorter texts."]
    settings = {key: value for key, value in advised.engine.items() if value is not False}
    described = ", ".join(key if value is True else f"{key} {value}" for key, value in settings.items())
    gpus = f"{advised.gpus:,} GPU{'s' * (advised.gpus > 1)}"
    lines += textwrap.wrap(f"Recommended: {gpus}, {described} ({figures(advised)}).", LINE)
    differing = {key: value for key, value in advised.engine.items() if getattr(config.engine, key) != value}
    overrides = [f"engine.{key}={json.dumps(value)}" for key, value in differing.items()]
    overrides += [f"cluster.workers={advised.gpus}"] if advised.gpus != config.cluster.workers else []
    return [*lines, *(f"  {override}" for override in overrides or ["as configured"])]


def _stage_details(plan: StagePlan) -> list[str]:
    """Return the lines of one stage: what a step is made of, what it needs, and the memory by ZeRO stage."""
    stage = plan.chosen
    unit, size = ("GB", GB) if stage.memory.total >= GB else ("MB", 1e6)
    images = f", {three_digits(stage.loader_cores)} CPU cores to prepare images" if stage.loader_cores else ""
    size_of_model = f"{three_digits(stage.parameters.total / 1e6)} M parameters"
    properties = [
        ["a step", f"{three_digits(stage.tokens_per_step)} tokens, {with_prefix(stage.flops_per_step, 'FLOP')}"],
        ["time", f"{short_time(stage.compute_seconds)} of arithmetic, {short_time(stage.communication_seconds)} of "
         f"communication ({with_prefix(stage.communication_bytes, 'B')} sent by each GPU)"],
        ["needs", f"{with_prefix(stage.storage_bytes_per_second, 'B')}/s of storage{images}"],
        ["checkpoint", f"{with_prefix(stage.checkpoint_bytes, 'B')} in {short_time(stage.checkpoint_seconds)}"],
    ]  # fmt: skip
    table = [[f"{unit} of a GPU", "states", "gradients", "activations", "other", "total", "rows"]]
    for name, alternative in {"as configured": stage, **plan.by_zero_stage}.items():
        memory = alternative.memory
        parts = memory.states, memory.gradients, memory.activations
        cells = [f"{value / size:,.2f}" for value in (*parts, memory.total - sum(parts), memory.total)]
        fits = "" if alternative.fits else "*" if alternative.largest_micro_batch else "none"
        table.append([name.replace(",", ""), *cells, f"{alternative.largest_micro_batch or ''}{fits}"])
    note = f"rows: the largest micro-batch that fits into {three_digits(stage.usable_bytes / GB)} GB"
    if any("*" in row[-1] for row in table):
        note += f"; * a micro-batch of {stage.micro_batch_size} does not"
    lines = [f"Stage {stage.name}: {size_of_model}", aligned([["", *row] for row in properties], width=LINE)]
    return [*lines, aligned(table, right=range(1, len(table[0]))), *textwrap.wrap(f"{note}.", LINE)]


def _short(name: str) -> str:
    return name if len(name) <= 15 else f"{name[:14]}…"


def _cost(value: float) -> str:
    return three_digits(value) if value >= 0.01 else "<0.01"


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
