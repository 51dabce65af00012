"""`mome bench`: measure the loader, the store, a training step and checkpoints on this machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from jobs.console import (
    Config,
    FileOption,
    JsonOption,
    Overrides,
    aligned,
    local_file,
    print_result,
    short_time,
    status,
    three_digits,
    with_prefix,
)  # fmt: skip
from jobs.results import checkpoint_text
from pipeline.config.errors import RunFailed

PEERS = ("webdataset_pil", "open_clip_composition")  # loaders of other projects, see `bench.loader.peer_batches`
HEADINGS = {
    "mb_per_second": "MB/s", "cpu_seconds_per_gib": "CPU s/GiB", "first_byte_seconds": "first byte s",
    "objects_per_second": "objects/s", "cpu_seconds": "CPU s", "seconds": "s",
}  # fmt: skip
MIB = 2**20
Rounds = Annotated[int, Option(min=1, help="Number of rounds; everything is measured once per round.")]

app = typer.Typer(no_args_is_help=True, help="Measure loader, store, training step and checkpoints on this machine.")


@app.command()
def loader(
    shards: Annotated[str | None, Option(help="Local indexed shards of pairs (default: synthetic).")] = None,
    photos: Annotated[list[Path] | None, FileOption(help="Folder of captioned photos for shards; repeatable.")] = None,
    vocabulary: Annotated[Path | None, FileOption(help="A vocab.txt (default: trained on the captions).")] = None,
    samples: Annotated[int, Option(min=1, help="Number of samples that each loader loads per round.")] = 2048,
    workers: Annotated[int, Option(min=0, help="Number of our processes; 0 uses threads of the trainer.")] = 1,
    threads: Annotated[int, Option(min=1, help="Threads per process; peers use workers x threads processes.")] = 1,
    batch: Annotated[int, Option(min=1, help="Number of samples per batch.")] = 64,
    rand_augment: Annotated[bool, Option(help="Measure with and without RandAugment, or only without.")] = True,
    rounds: Rounds = 3,
    peer: Annotated[list[str] | None, Option(help=f"Loader to compare: {', '.join(PEERS)} (default: all).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the CPU time per sample of our loader, and of webdataset and open_clip's pipeline with Pillow.

    All processes of a loader count, after its warm-up.
    """
    from jobs.bench.loader import BenchJob, bench_loader

    words, peers = str(vocabulary or ""), PEERS if peer is None else tuple(peer)
    job = BenchJob("mome", "", words, samples, batch, workers, threads, num_ops=2 if rand_augment else 0)
    with status("starting") as update:
        result = bench_loader(shards, tuple(photos or ()), job, rounds, peers, update)
    rows: dict[str, dict[str, float]] = {
        name: {"samples/s a core": rate, "CPU s per 1,000": result["cpu_seconds_per_1000"][name]}
        for name, rate in result["samples_per_core_second"].items()
    }
    for name, rate in result.get("without_rand_augment", {}).get("samples_per_core_second", {}).items():
        rows[name]["without RandAugment"] = rate
    settings = {
        key: value for key, value in result["settings"].items() if key in ("samples", "batch", "rounds", "cores")
    }
    described = ", ".join(f"{key} {value}" for key, value in settings.items())
    limit = f"decoding alone: {three_digits(result['decode_limit'])} samples/s a core; {described}"
    print_result(result, as_json, f"{comparison('loader', rows)}\n{limit}")


@app.command()
def storage(
    url: Annotated[str | None, Argument(help="Folder or URL to use (default: a local S3 server).")] = None,
    object_mib: Annotated[int, Option(min=1, help="Size of the object, in MiB.")] = 128,
    range_mib: Annotated[int, Option(min=1, help="Size of one request, in MiB.")] = 8,
    in_flight: Annotated[int, Option(min=1, help="Number of concurrent requests.")] = 4,
    objects: Annotated[int, Option(min=1, help="Number of objects of the listed folder.")] = 500,
    rounds: Rounds = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a store is read and listed by our client, by fsspec and by botocore."""
    from jobs.bench.storage import bench_storage

    with status("starting") as update:
        sizes: dict[str, Any] = {"object_bytes": object_mib * MIB, "range_bytes": range_mib * MIB, "objects": objects}
        result = bench_storage(url, **sizes, in_flight=in_flight, rounds=rounds, progress=update)
    listed = {name: figures for name, figures in result["list"].items() if name != "objects"}
    heading = f"{result['url']} ({result['store']}): {object_mib} MiB, {objects} objects, medians of {rounds}"
    tables = comparison("read by", result["read"]), comparison("listed by", listed)
    print_result(result, as_json, "\n\n".join([heading, *tables]))


@app.command()
def checkpoint(
    config: Annotated[Path | None, Argument(parser=local_file, help="Config (default: VLMo base).")] = None,
    url: Annotated[str | None, Option(help="Folder or URL to save in (default: a temporary folder).")] = None,
    mb_per_second: Annotated[float, Option(min=0, help="MB/s that the simulated store writes; 0: no limit.")] = 50.0,
    rounds: Rounds = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure how long asynchronous and synchronous saves stall training on a slow store.

    Needs 24 bytes of memory per parameter.
    """
    from jobs.bench.checkpoint import bench_checkpoint

    with status("starting") as update:
        result = bench_checkpoint(config, url, mb_per_second, rounds, update)
    print_result(result, as_json, checkpoint_text)


@app.command()
def step(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[str | None, Option(help="Name of the stage (default: the last one).")] = None,
    ranks: Annotated[int, Option(min=1, help="Number of ranks on this machine, one per GPU if it has any.")] = 1,
    steps: Annotated[int, Option(min=0, help="Number of timed steps; 0 runs only the step that measures memory.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Measure time and memory of a stage's training steps, next to the estimate of `mome plan`.

    Needs neither Ray nor data. On several machines: torchrun … -m jobs.bench.step CONFIG [--stage NAME] \\[key=value …]
    """
    from pipeline.config.load import load_config

    load_config(config, overrides or [])  # one message, before any rank starts
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "jobs.bench.step", str(config), f"--steps={steps}", *(overrides or [])]
    if stage is not None:
        command.append(f"--stage={stage}")
    with status("training a few steps"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not results:
        errors = [line for line in done.stderr.splitlines() if line.startswith("rank ") or "Error" in line]
        raise RunFailed("bench step: " + ("\n".join(errors[:5]) or done.stderr[-2000:]))
    result = json.loads(results[-1])
    print_result(result, as_json, step_table(result))


def comparison(title: str, figures: dict[str, dict[str, float]]) -> str:
    """Return a table with a line for each contender and a column for each of their figures."""
    keys = list(next(iter(figures.values())))
    lines = [[title, *(HEADINGS.get(key, key) for key in keys)]]
    lines += [[name, *(three_digits(row[key]) for key in keys)] for name, row in figures.items()]
    return aligned(lines, right=range(1, len(lines[0])))


def step_table(result: dict[str, Any]) -> str:
    """Return the speed of a step, and a table of a rank's memory, measured and as estimated by `mome plan`."""
    ranks, time = result["world_size"], short_time(result["step_seconds"])
    heading = f"stage {result['stage']} on {ranks} rank{'s' * (ranks > 1)}: {time} a step"
    rates = with_prefix(result["tflops"] * 1e12, "FLOP/s"), f"MFU {result['mfu']:.0%}"
    speed = f"{three_digits(result['pairs_per_second'])} samples/s, {rates[0]} a rank, {rates[1]}"
    table = [["memory of a rank", "measured", "planned", "planned / measured"]]
    for name, measured in result["measured"].items():
        planned = result["predicted"][name]
        ratio = three_digits(planned / measured) if measured else "–"
        table.append([name, with_prefix(measured, "B"), with_prefix(planned, "B"), ratio])
    return "\n".join([heading, speed, "", aligned(table, right=(1, 2, 3))])
