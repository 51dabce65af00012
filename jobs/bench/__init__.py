"""`mome bench`: measure the loader, the store, a training step and checkpoints on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.console import print_result, status
from jobs.options import Config, JsonOption, Overrides, local_file

app = typer.Typer(no_args_is_help=True, help="Measure loader, store, training step and checkpoints on this machine.")

PEERS = ("webdataset_pil", "open_clip_composition", "ray_data")
MIB = 2**20


@app.command()
def loader(
    shards: Annotated[str | None, typer.Option(help="A local folder of indexed shards of pairs.")] = None,
    photos: Annotated[
        list[Path] | None,
        typer.Option(parser=local_file, help="A folder of captioned photos, repeated into shards; may be given often."),
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(parser=local_file, help="A vocab.txt; else one is trained from the captions.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples each contender loads in a round.")] = 2048,
    workers: Annotated[int, typer.Option(min=0, help="Our processes; 0: threads of the trainer's own.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each; peers get workers x threads processes.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 64,
    rand_augment: Annotated[bool, typer.Option(help="Measure with RandAugment and without, or only without.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Every contender is measured once in each.")] = 3,
    peer: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PEERS)}; may be given often.")] = None,
    uint8_peers: Annotated[bool, typer.Option(help="Measure the peers also without their float32 output.")] = True,
    as_json: JsonOption = False,
) -> None:
    """CPU time of a sample by our loader, by webdataset with PIL, by open_clip's stages and by Ray Data.

    Every process of a contender counts, once it is warm. Without --shards and --photos, pictures are drawn.
    """
    from jobs.bench.loader import Settings, bench_loader

    chosen = Settings(
        shards=shards,
        photos=tuple(photos or ()),
        vocabulary=str(vocabulary) if vocabulary else None,
        samples=samples,
        workers=workers,
        threads=threads,
        batch=batch,
        rand_augment=rand_augment,
        rounds=rounds,
        peers=PEERS if peer is None else tuple(peer),
        uint8_peers=uint8_peers,
    )
    with status("starting") as update:
        print_result(bench_loader(chosen, update), as_json)


@app.command()
def storage(
    url: Annotated[str | None, typer.Argument(help="A folder or URL to write to and read; else a local S3.")] = None,
    object_mib: Annotated[int, typer.Option(min=1, help="Size of the object that is read.")] = 128,
    range_mib: Annotated[int, typer.Option(min=1, help="Size of one request.")] = 8,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    objects: Annotated[int, typer.Option(min=1, help="Objects of the folder that is listed.")] = 500,
    rounds: Annotated[int, typer.Option(min=1, help="Every contender is measured once in each.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """How fast a store is read and listed from here, by us, by fsspec and by botocore."""
    from jobs.bench.storage import bench_storage

    with status("starting") as update:
        result = bench_storage(
            url,
            object_bytes=object_mib * MIB,
            range_bytes=range_mib * MIB,
            in_flight=in_flight,
            objects=objects,
            rounds=rounds,
            progress=update,
        )
    print_result(result, as_json)


@app.command()
def checkpoint(
    config: Annotated[
        Path | None, typer.Argument(parser=local_file, help="A run's config, for its model; else VLMo base.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A folder or URL to save in; else a temporary folder.")] = None,
    mb_per_second: Annotated[float, typer.Option(min=0, help="Of the store that is imitated; 0: as it is.")] = 50.0,
    rounds: Annotated[int, typer.Option(min=1, help="Saves of each kind.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """How long a save stops training, beside a synchronous one, on a slow store; 24 bytes of memory a parameter."""
    from jobs.bench.checkpoint import bench_checkpoint

    with status("starting") as update:
        result = bench_checkpoint(config, url, mb_per_second=mb_per_second, rounds=rounds, progress=update)
    print_result(result, as_json)


@app.command()
def step(
    config: Config,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Name of the stage (default: the last one).")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks on this machine, one per GPU if it has any.")] = 1,
    steps: Annotated[
        int, typer.Option(min=0, help="Number of timed steps; 0 runs only the step that measures memory.")
    ] = 5,
    as_json: JsonOption = False,
) -> None:
    """Measure time and memory of a stage's training steps, next to the estimate of `mome plan`.

    Needs neither Ray nor data. On several machines: torchrun … -m jobs.bench.step CONFIG [--stage NAME] \\[key=value …]
    """
    from jobs.bench.step import run_step_bench

    with status("training a few steps"):
        result = run_step_bench(config, overrides or [], stage, ranks, steps)
    print_result(result, as_json)
