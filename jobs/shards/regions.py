"""`mome shards regions`: run a detector over shards on Ray actors, and write them again with its regions.

Each shard is the work of one actor. It is written to a temporary file and uploaded as two objects: first a record of
its origin (`<shard>.regions.json`), then the tar, atomically. A shard with both is done, and a command that was
interrupted continues with the others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.console import echo
from jobs.output import list_of_findings
from jobs.shards.report import ShardProgress, report_manifest
from pipeline.config.errors import ConfigError, DataError, MomeError, RunFailed
from pipeline.config.schema import ClusterConfig
from pipeline.config.urls import is_local, local_path
from pipeline.data.building.files import Sample
from pipeline.data.building.importers import write_tar
from pipeline.data.contents.images import decode
from pipeline.data.contents.members import REGIONS, image_bytes
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.manifest import index_shards, shard_folder, shard_names
from pipeline.data.shards.tar import TarSample, open_tar
from pipeline.data.storage import ObjectInfo, Storage, join

RECORD = ".regions.json"
RESTARTS = 3  # of an actor whose node is lost; its shard starts over
_MAX_PRINTED = 10  # bad samples


@dataclass(frozen=True)
class RegionSettings:
    """Everything that determines the regions of a given shard."""

    detector: str  # its digest
    regions: int
    max_pixels: int


@dataclass
class RegionShard:
    """Record of a shard with regions."""

    shard: str
    setting: RegionSettings
    source: ObjectInfo  # the shard that was read
    samples: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)  # key, stage and reason of each sample without regions


def detect_regions(
    url: str,
    out: str,
    detector: Path,
    max_regions: int,
    workers: int,
    gpus_per_worker: float,
    max_pixels: int,
    address: str | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Write the shards with regions and print the result; the arguments are the options of `mome shards regions`."""
    cluster = ClusterConfig(workers=workers, gpus_per_worker=gpus_per_worker, address=address)
    with ExitStack() as stack, ShardProgress("detecting") as progress:
        findings = stack.enter_context(list_of_findings(report, "--report")) if report else None
        shards = add_regions(Storage(), url, out, detector, max_regions, max_pixels, cluster, progress)
        bad = [{"shard": shard.shard, **sample} for shard in shards for sample in shard.bad]
        if len(bad) == sum(shard.samples for shard in shards):
            example = f"{bad[0]['key']}: {bad[0]['reason']}" if bad else "there is no sample"
            raise DataError(f"{url}: no sample has an image that the detector could read ({example})")
        manifest = index_shards(Storage(), out, progress.shard)
        if findings is not None:
            findings.write("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in bad).encode())
    for sample in bad[:_MAX_PRINTED]:
        echo(f"no regions: {sample['key']} in {sample['shard']}: {sample['stage']}: {sample['reason']}", err=True)
    if len(bad) > _MAX_PRINTED:
        echo(f"no regions: {len(bad) - _MAX_PRINTED} more", err=True)
    report_manifest(manifest, out, as_json, {"bad_samples": len(bad), "report": str(report) if report else None})


def add_regions(
    storage: Storage,
    url: str,
    out: str,
    detector: Path,
    max_regions: int,
    max_pixels: int,
    cluster: ClusterConfig,
    progress: ShardProgress,
) -> list[RegionShard]:
    """Return the shards at `out`, including those of an earlier call, in the order of their names.

    Raises ConfigError for an unusable detector or an `out` with other content, DataError for a truncated shard.
    """
    from jobs.shards.detector import detector_digest

    folder, out = _absolute(shard_folder(url)), _absolute(out)
    if folder == out:
        raise ConfigError(f"{out}: the shards are copied, not changed; choose another folder than {url}")
    setting = RegionSettings(detector_digest(detector), max_regions, max_pixels)
    sources = storage.list_info(folder)
    names = shard_names(url, sources)
    done = _finished_shards(storage, out, names, sources, setting)
    for shard in done.values():
        progress.shard(len(done), len(names), shard.shard)
    missing = [name for name in names if name not in done]
    if missing:
        task = RegionTask(storage, folder, out, detector.resolve(), setting)
        for shard in _on_actors(task, {name: sources[name] for name in missing}, cluster):
            done[shard.shard] = shard
            progress.shard(len(done), len(names), shard.shard)
    return [done[name] for name in names]


def _absolute(url: str) -> str:
    """Return a URL that is valid for every actor, whatever its working folder."""
    return str(local_path(url).resolve()) if is_local(url) else url.rstrip("/")


@dataclass(frozen=True)
class RegionTask:
    """Arguments of every actor."""

    storage: Storage
    folder: str
    out: str
    detector: Path
    setting: RegionSettings


class RegionActor:
    """Detector that processes one shard after the other."""

    def __init__(self, task: RegionTask):
        self._task = task
        self._detector: Any = None

    def detect(self, name: str, source: ObjectInfo) -> RegionShard:
        """Write a shard and its record. Raise DataError for a truncated or damaged shard."""
        task, location = self._task, join(self._task.folder, name)
        if self._detector is None:  # not in the constructor, because Ray would hide the type of its errors
            import torch

            from jobs.shards.detector import Detector

            self._detector = Detector(task.detector, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        shard = RegionShard(name, task.setting, source)
        with tempfile.TemporaryDirectory(prefix="mome-regions-") as folder:
            local = Path(folder) / name
            with open_tar(task.storage, location, source) as tar:
                write_tar(local, (self._with_regions(sample, shard) for sample in tar.samples()))
            task.storage.write(join(task.out, name + RECORD), json.dumps(asdict(shard), indent=1).encode())
            task.storage.upload(local, join(task.out, name))
        return shard

    def _with_regions(self, sample: TarSample, shard: RegionShard) -> Sample:
        """Return the sample with regions in place of any that it had; without regions if its image is bad."""
        members: Sample = {"__key__": sample.key, **sample.contents}
        members.pop(REGIONS, None)
        shard.samples += 1
        try:
            with judging("image"):
                image = decode(image_bytes(sample.contents), self._task.setting.max_pixels)
            members[REGIONS] = self._detector(image, self._task.setting.regions).to_bytes()
        except BadSample as error:
            shard.bad.append({"key": sample.key, "stage": error.stage, "reason": error.reason})
        return members


def _on_actors(task: RegionTask, shards: Mapping[str, ObjectInfo], cluster: ClusterConfig) -> Iterator[RegionShard]:
    """Yield each shard when it is done, in any order. Raise the errors of the actors."""
    from jobs.cluster import connect

    connect(cluster)
    import ray
    from ray.util import ActorPool

    actor_class: Any = ray.remote(RegionActor).options(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    actors = [actor_class.remote(task) for _ in range(min(cluster.workers, len(shards)))]
    try:
        yield from ActorPool(actors).map_unordered(
            lambda actor, shard: actor.detect.remote(*shard), list(shards.items())
        )
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, MomeError) else RunFailed(f"a detector failed: {error}") from None
    except ray.exceptions.RayActorError as error:
        raise RunFailed(
            f"an actor died repeatedly ({error}). If the machine is short of memory, use fewer --workers"
        ) from error
    finally:
        for actor in actors:
            ray.kill(actor)


def _finished_shards(
    storage: Storage, out: str, names: list[str], sources: Mapping[str, ObjectInfo], setting: RegionSettings
) -> dict[str, RegionShard]:
    """Return the shards that are done. Raise ConfigError for an `out` with content that this command did not write."""
    objects = storage.list_info(out)
    tars = [name for name in objects if name.endswith(".tar")]
    if others := [name for name in tars if name not in names or name + RECORD not in objects]:
        raise ConfigError(f"{out} has {others[0]}, which is none of these shards with regions; choose another folder")
    done = {}
    for name in tars:
        record = _parse_record(storage.read(join(out, name + RECORD)), join(out, name + RECORD))
        if record.setting != setting:
            raise ConfigError(
                f"{out}: {name} was made by another detector, or with other --regions or --max-pixels; give the same, "
                "or choose another folder"
            )
        if record.source == sources[name]:
            done[name] = record
    return done


def _parse_record(data: bytes, location: str) -> RegionShard:
    try:
        content = json.loads(data)
        shard = RegionShard(**content)
        setting, source = RegionSettings(**content["setting"]), ObjectInfo(**content["source"])
        return replace(shard, setting=setting, source=source)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{location}: not a record of a shard's regions ({error}). Delete it and its tar") from error
