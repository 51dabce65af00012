"""`mome shards regions`: run a detector over shards on Ray actors, and write them again with its regions.

Each shard is the work of one actor. It is written to a temporary file and uploaded as two objects: first a record of
its origin (`<shard>.regions.json`), then the tar, atomically. A shard with both is done, and a command that was
interrupted continues with the others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jobs.console import echo, list_of_findings
from jobs.shards.report import ShardProgress, report_manifest
from pipeline.config.errors import ConfigError, DataError, MomeError, RunFailed
from pipeline.config.schema import ClusterConfig
from pipeline.config.urls import is_local, local_path
from pipeline.data.building.importers import write_tar
from pipeline.data.building.inputs import Sample
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
    url: str, out: str, detector: Path, max_regions: int, max_pixels: int, cluster: ClusterConfig,
    report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the shards with regions and print the result; the arguments are the options of `mome shards regions`.

    Raises ConfigError for an unusable detector or an `out` with other content, DataError for a truncated shard.
    """
    from jobs.shards.detector import detector_digest

    storage = Storage()
    with (
        list_of_findings(report, "--report") if report else nullcontext() as findings,
        ShardProgress("detecting") as progress,
    ):
        folder, target = (  # valid for every actor, whatever its working folder
            str(local_path(place).resolve()) if is_local(place) else place.rstrip("/")
            for place in (shard_folder(url), out)
        )
        if folder == target:
            raise ConfigError(f"{target}: the shards are copied, not changed; choose another folder than {url}")
        setting = RegionSettings(detector_digest(detector), max_regions, max_pixels)
        sources = storage.list_info(folder)
        names = shard_names(url, sources)
        done = _finished_shards(storage, target, names, sources, setting)
        for name in done:
            progress.shard(len(done), len(names), name)
        if missing := {name: sources[name] for name in names if name not in done}:
            actor = RegionActor(storage, folder, target, detector.resolve(), setting)
            for shard in _on_actors(actor, missing, cluster):
                done[shard.shard] = shard
                progress.shard(len(done), len(names), shard.shard)
        bad = [{"shard": name, **sample} for name in names for sample in done[name].bad]
        if len(bad) == sum(shard.samples for shard in done.values()):
            example = f"{bad[0]['key']}: {bad[0]['reason']}" if bad else "there is no sample"
            raise DataError(f"{url}: no sample has an image that the detector could read ({example})")
        manifest = index_shards(storage, out, progress.shard)
        if findings is not None:
            findings.write("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in bad).encode())
    for sample in bad[:_MAX_PRINTED]:
        echo(f"no regions: {sample['key']} in {sample['shard']}: {sample['stage']}: {sample['reason']}", err=True)
    if len(bad) > _MAX_PRINTED:
        echo(f"no regions: {len(bad) - _MAX_PRINTED} more", err=True)
    report_manifest(manifest, out, as_json, {"bad_samples": len(bad), "report": str(report) if report else None})


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
        location = join(out, name + RECORD)
        try:
            content = json.loads(storage.read(location))
            stored, source = RegionSettings(**content["setting"]), ObjectInfo(**content["source"])
            shard = RegionShard(**{**content, "setting": stored, "source": source})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{location}: not a record of a shard's regions ({error}). Delete it and its tar"
            ) from error
        if stored != setting:
            raise ConfigError(
                f"{out}: {name} was made by another detector, or with other --regions or --max-pixels; give the same, "
                "or choose another folder"
            )
        if source == sources[name]:
            done[name] = shard
    return done


@dataclass
class RegionActor:
    """Detector that processes one shard after the other."""

    storage: Storage
    folder: str
    out: str
    detector: Path
    setting: RegionSettings
    _loaded: Any = None  # on first use, because Ray would hide the type of errors in the constructor

    def detect(self, name: str, source: ObjectInfo) -> RegionShard:
        """Write a shard and its record. Raise DataError for a truncated or damaged shard."""
        if self._loaded is None:
            import torch

            from jobs.shards.detector import Detector

            self._loaded = Detector(self.detector, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        shard = RegionShard(name, self.setting, source)

        def with_regions(samples: Iterator[TarSample]) -> Iterator[Sample]:
            """Yield the samples with regions in place of any that they had, or without if the image is bad."""
            for sample in samples:
                members: Sample = {"__key__": sample.key, **sample.contents}
                members.pop(REGIONS, None)
                shard.samples += 1
                try:
                    with judging("image"):
                        image = decode(image_bytes(sample.contents), self.setting.max_pixels)
                    members[REGIONS] = self._loaded(image, self.setting.regions).to_bytes()
                except BadSample as error:
                    shard.bad.append({"key": sample.key, "stage": error.stage, "reason": error.reason})
                yield members

        with tempfile.TemporaryDirectory(prefix="mome-regions-") as folder:
            local = Path(folder) / name
            with open_tar(self.storage, join(self.folder, name), source) as tar:
                write_tar(local, with_regions(tar.samples()))
            self.storage.write(join(self.out, name + RECORD), json.dumps(asdict(shard), indent=1).encode())
            self.storage.upload(local, join(self.out, name))
        return shard


def _on_actors(actor: RegionActor, shards: Mapping[str, ObjectInfo], cluster: ClusterConfig) -> Iterator[RegionShard]:
    """Yield each shard when it is done by a copy of `actor`, in any order. Raise the errors of the actors."""
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
    arguments = [getattr(actor, parameter.name) for parameter in fields(actor)]
    actors = [actor_class.remote(*arguments) for _ in range(min(cluster.workers, len(shards)))]
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
        for running in actors:
            ray.kill(running)
