"""`mome shards regions`: run a detector over shards, on Ray actors, and write them again with the regions it found.

A shard is one actor's work. It is written to a temporary file, and then goes to OUT in two objects: first a record of
what made it (`<shard>.regions.json`), then the tar, whole or not at all. A shard that has both is done, and a command
that was interrupted goes on with the others.
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
RESTARTS = 3  # of an actor whose node is lost; its shard is begun anew
_TOLD = 10  # bad samples named on the screen


@dataclass(frozen=True)
class Setting:
    """What the regions of a shard depend on, beside the shard."""

    detector: str  # its digest
    regions: int
    max_pixels: int


@dataclass
class Done:
    """One shard with regions, as its record tells of it."""

    shard: str
    setting: Setting
    source: ObjectInfo  # the shard that was read
    samples: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)  # key, stage and reason of each that has no regions


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
        done = add_regions(Storage(), url, out, detector, max_regions, max_pixels, cluster, progress)
        bad = [{"shard": shard.shard, **found} for shard in done for found in shard.bad]
        if len(bad) == sum(shard.samples for shard in done):
            example = f"{bad[0]['key']}: {bad[0]['reason']}" if bad else "there is no sample"
            raise DataError(f"{url}: not one sample has a picture that the detector could read ({example})")
        manifest = index_shards(Storage(), out, progress.shard)
        if findings is not None:
            findings.write("".join(json.dumps(found, ensure_ascii=False) + "\n" for found in bad).encode())
    _tell_bad(bad)
    report_manifest(manifest, out, as_json, {"bad_samples": len(bad), "report": str(report) if report else None})


def add_regions(
    storage: Storage,
    url: str,
    out: str,
    detector: Path,
    most: int,
    max_pixels: int,
    cluster: ClusterConfig,
    progress: ShardProgress,
) -> list[Done]:
    """The shards at `out`, those that an earlier call made included, in the order of their names.

    Raises ConfigError for a detector that cannot be used or an `out` that holds something else, DataError for a shard
    that is cut.
    """
    from jobs.shards.detector import detector_digest

    folder, out = _absolute(shard_folder(url)), _absolute(out)
    if folder == out:
        raise ConfigError(f"{out}: the shards are written anew, not changed; choose another folder than {url}")
    setting = Setting(detector_digest(detector), most, max_pixels)
    sources = storage.list_info(folder)
    names = shard_names(url, sources)
    done = _finished(storage, out, names, sources, setting)
    for finished in done.values():
        progress.shard(len(done), len(names), finished.shard)
    missing = [name for name in names if name not in done]
    if missing:
        task = RegionTask(storage, folder, out, detector.resolve(), setting)
        for finished in _on_actors(task, {name: sources[name] for name in missing}, cluster):
            done[finished.shard] = finished
            progress.shard(len(done), len(names), finished.shard)
    return [done[name] for name in names]


def _absolute(url: str) -> str:
    """The same for every actor, whatever its working folder."""
    return str(local_path(url).resolve()) if is_local(url) else url.rstrip("/")


@dataclass(frozen=True)
class RegionTask:
    """What every actor is told."""

    storage: Storage
    folder: str
    out: str
    detector: Path
    setting: Setting


class RegionActor:
    """A detector that goes over one shard after the other."""

    def __init__(self, task: RegionTask):
        self._task, self._detector = task, None

    def detect(self, name: str, source: ObjectInfo) -> Done:
        """Writes a shard and its record. Raises DataError for a shard that is cut or no tar."""
        if self._detector is None:  # not when the actor is made: an error there would reach nobody as itself
            self._detector = _open(self._task.detector)
        task, location = self._task, join(self._task.folder, name)
        done = Done(name, task.setting, source)
        with tempfile.TemporaryDirectory(prefix="mome-regions-") as folder:
            local = Path(folder) / name
            with open_tar(task.storage, location, source) as tar:
                write_tar(local, (self._with_regions(sample, done) for sample in tar.samples()))
            task.storage.write(join(task.out, name + RECORD), json.dumps(asdict(done), indent=1).encode())
            task.storage.upload(local, join(task.out, name))
        return done

    def _with_regions(self, sample: TarSample, done: Done) -> Sample:
        """The sample as it was, with regions in the place of any that it had; without, if its picture is bad."""
        assert self._detector is not None
        members: Sample = {"__key__": sample.key, **sample.contents}
        members.pop(REGIONS, None)
        done.samples += 1
        try:
            with judging("image"):
                picture = decode(image_bytes(sample.contents), self._task.setting.max_pixels)
            members[REGIONS] = self._detector(picture, self._task.setting.regions).to_bytes()
        except BadSample as error:
            done.bad.append({"key": sample.key, "stage": error.stage, "reason": error.reason})
        return members


def _open(folder: Path) -> Any:
    import torch

    from jobs.shards.detector import Detector

    return Detector(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _on_actors(task: RegionTask, shards: Mapping[str, ObjectInfo], cluster: ClusterConfig) -> Iterator[Done]:
    """Each shard when it is done, by whichever actor is free. Raises what the actors raise."""
    from jobs.cluster import connect

    connect(cluster)
    import ray
    from ray.util import ActorPool

    actor: Any = ray.remote(RegionActor).options(
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
    )
    actors = [actor.remote(task) for _ in range(min(cluster.workers, len(shards)))]
    try:
        yield from ActorPool(actors).map_unordered(lambda one, shard: one.detect.remote(*shard), list(shards.items()))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, MomeError) else RunFailed(f"a detector failed: {error}") from None
    except ray.exceptions.RayActorError as error:
        raise RunFailed(
            f"an actor died again and again ({error}). If the machine is short of memory, use fewer --workers"
        ) from error
    finally:
        for each in actors:
            ray.kill(each)


def _finished(
    storage: Storage, out: str, names: list[str], sources: Mapping[str, ObjectInfo], setting: Setting
) -> dict[str, Done]:
    """The shards that need not be made again. ConfigError for an `out` that holds what this would not make."""
    found = storage.list_info(out)
    tars = [name for name in found if name.endswith(".tar")]
    if others := [name for name in tars if name not in names or name + RECORD not in found]:
        raise ConfigError(f"{out} holds {others[0]}, which is none of these shards with regions; choose another folder")
    done = {}
    for name in tars:
        record = _parse(storage.read(join(out, name + RECORD)), join(out, name + RECORD))
        if record.setting != setting:
            raise ConfigError(
                f"{out}: {name} was made by another detector, or with other --regions or --max-pixels; give the same, "
                "or choose another folder"
            )
        if record.source == sources[name]:
            done[name] = record
    return done


def _parse(data: bytes, location: str) -> Done:
    try:
        found = json.loads(data)
        done = Done(**found)
        return replace(done, setting=Setting(**found["setting"]), source=ObjectInfo(**found["source"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{location}: no record of a shard's regions ({error}). Delete it and its tar") from error


def _tell_bad(bad: list[dict[str, str]]) -> None:
    for found in bad[:_TOLD]:
        echo(f"no regions: {found['key']} in {found['shard']}: {found['stage']}: {found['reason']}", err=True)
    if len(bad) > _TOLD:
        echo(f"no regions: {len(bad) - _TOLD} more", err=True)
