"""`mome shards regions`: run a detector over shards on Ray actors, and write them again with its regions.

Each shard is the work of one actor, which uploads a record of its origin (`<shard>.regions.json`), then the tar. A
shard with both is done, and a command that was interrupted continues with the others.

Detectors are Hugging Face's `AutoModelForObjectDetection` (DETR and its relatives, YOLOS, RT-DETR). They have no pooled
region feature: the feature of a region is the last hidden vector of its query, from which its class and box are
predicted. Its class is the query's most likely one, and its confidence that class's probability. Shapes: Q queries of
the detector, D its width, C its classes.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from jobs.console import echo, list_of_findings
from jobs.shards.commands import ShardProgress, report_manifest
from pipeline.config.errors import ConfigError, DataError, MomeError, RunFailed
from pipeline.config.schema import ClusterConfig
from pipeline.config.urls import is_local, local_path
from pipeline.data.building.importers import write_tar
from pipeline.data.building.inputs import Sample
from pipeline.data.contents.images import decode
from pipeline.data.contents.members import REGIONS, image_bytes
from pipeline.data.contents.regions import RegionRecord
from pipeline.data.quarantine import BadSample, judging
from pipeline.data.shards.manifest import index_shards, parse_pattern, shard_names
from pipeline.data.shards.tar import TarSample, open_tar
from pipeline.data.storage import ObjectInfo, Storage, join

RECORD = ".regions.json"
RESTARTS = 3  # of an actor whose node is lost; its shard starts over
_MAX_PRINTED = 10  # bad samples


@dataclass(frozen=True)
class RegionSettings:
    """Everything that determines the regions of a given shard."""

    detector: str  # SHA-256 (hex) of the files of its folder
    regions: int
    max_pixels: int


@dataclass
class RegionShard:
    """Record of a shard with regions."""

    shard: str
    setting: RegionSettings
    source: ObjectInfo  # the shard that was read
    samples: int = 0
    regions: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)  # key, stage and reason of each sample without regions


def detect_regions(
    url: str, out: str, detector: Path, max_regions: int, max_pixels: int, cluster: ClusterConfig,
    report: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Write the shards with regions and print the result; the arguments are the options of `mome shards regions`."""
    if not detector.is_dir():
        raise ConfigError(
            f"--detector {detector}: no such folder. Expected a detector on this machine, such as the folder that "
            "`hf download facebook/detr-resnet-50 --local-dir detr` writes; nothing is downloaded here"
        )
    storage, digest = Storage(), hashlib.sha256()
    for path in sorted(path for path in detector.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    with list_of_findings(report, "--report") as findings, ShardProgress("detecting") as progress:
        places = (parse_pattern(url).folder, out)  # valid for every actor, whatever its working folder
        folder, target = (str(local_path(p).resolve()) if is_local(p) else p.rstrip("/") for p in places)
        if folder == target:
            raise ConfigError(f"{target}: the shards are copied, not changed; choose another folder than {url}")
        setting = RegionSettings(digest.hexdigest(), max_regions, max_pixels)
        sources, objects = storage.list_info(folder), storage.list_info(target)
        names = shard_names(url, sources)
        tars = [name for name in objects if name.endswith(".tar")]
        if others := [name for name in tars if name not in names or name + RECORD not in objects]:
            reason = "which is none of these shards with regions; choose another folder"
            raise ConfigError(f"{target} has {others[0]}, {reason}")
        done: dict[str, RegionShard] = {}
        records = TypeAdapter(RegionShard)
        for name in tars:
            location = join(target, name + RECORD)
            try:
                shard = records.validate_json(storage.read(location))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                reason = ".".join(map(str, first["loc"])) + ": " + first["msg"] if first["loc"] else first["msg"]
                fault = f"not a record of a shard's regions ({reason}). Delete it and its tar"
                raise DataError(f"{location}: {fault}") from error
            if shard.setting != setting:
                options = "another detector, or with other --regions or --max-pixels"
                raise ConfigError(f"{target}: {name} was made by {options}; give the same, or choose another folder")
            if shard.source == sources[name]:
                done[name] = shard
        for name in done:
            progress.shard(len(done), len(names), name)
        if missing := {name: sources[name] for name in names if name not in done}:
            for shard in _on_actors((storage, folder, target, detector.resolve(), setting), missing, cluster):
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
    facts = {"bad_samples": len(bad), "regions": sum(shard.regions for shard in done.values())}
    report_manifest(manifest, out, as_json, facts | {"report": str(report) if report else None})


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
                    record = self._loaded(image, self.setting.regions)
                    members[REGIONS] = record.to_bytes()
                    shard.regions += len(record.boxes)
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


def _on_actors(
    arguments: tuple[object, ...], shards: Mapping[str, ObjectInfo], cluster: ClusterConfig
) -> Iterator[RegionShard]:
    """Yield each shard when one of the actors has written it, in any order. Raise the errors of the actors."""
    from jobs.cluster import connect

    connect(cluster)
    import ray
    from ray.util import ActorPool

    resources = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}
    actor_class: Any = ray.remote(RegionActor).options(**resources, max_restarts=RESTARTS, max_task_retries=RESTARTS)
    actors = [actor_class.remote(*arguments) for _ in range(min(cluster.workers, len(shards)))]
    try:
        yield from ActorPool(actors).map_unordered(lambda actor, shard: actor.detect.remote(*shard), [*shards.items()])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, MomeError) else RunFailed(f"a detector failed: {error}") from None
    except ray.exceptions.RayActorError as error:
        remedy = "If the machine is short of memory, use fewer --workers"
        raise RunFailed(f"an actor died repeatedly ({error}). {remedy}") from error
    finally:
        for running in actors:
            ray.kill(running)


class Detector:
    """Detector of a local folder. Raises ConfigError if the folder has none that can be used."""

    def __init__(self, folder: Path, device: torch.device):
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            # Pillow, whatever else is installed, because torchvision's resizing gives other pixels.
            self._prepare = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
            options |= {"use_safetensors": True, "dtype": torch.float32}
            model = AutoModelForObjectDetection.from_pretrained(folder, **options)
        except Exception as error:  # damaged files cause every kind of error in transformers and safetensors
            raise ConfigError(
                f"--detector {folder}: no detector that transformers can load ({error}). Expected the files that "
                "save_pretrained writes for an object-detection model and its image processor, on every node"
            ) from error
        self._model, self._device = model.eval().to(device), device

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, max_regions: int) -> RegionRecord:
        """Return the regions of highest confidence of an image (H, W, 3) uint8, in its own pixels.

        Images are processed one by one, because some detectors attend to the padding of a batch. Raises BadSample for
        an image that the detector refuses.
        """
        try:
            inputs = self._prepare(images=image, return_tensors="pt").to(self._device)
            output = self._model(**inputs)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            raise BadSample("detect", f"the detector refuses an image of {image.shape[:2]}: {error}") from error
        if getattr(output, "last_hidden_state", None) is None:
            raise ConfigError(f"{type(self._model).__name__} returns no hidden vectors of its queries; use another")
        logits, boxes = output.logits[0].float(), output.pred_boxes[0].float()
        hidden = output.last_hidden_state[0, -len(logits) :].float()  # YOLOS's sequence begins with its patches
        # (Q, C): a softmax with a last class for "nothing" (DETR, YOLOS), or sigmoids (RT-DETR and others).
        has_nothing = logits.shape[1] == self._model.config.num_labels + 1
        probabilities = logits.softmax(dim=1)[:, :-1] if has_nothing else logits.sigmoid()
        confidences, classes = probabilities.max(dim=1)
        best = torch.argsort(confidences, descending=True, stable=True)[:max_regions]
        # Centres and sizes relative to the image -> x1, y1, x2, y2 in its pixels, clipped to it.
        height, width = image.shape[:2]
        centre, half = boxes[best].split(2, dim=1)
        corners = torch.cat([centre - half / 2, centre + half / 2], dim=1).clamp(0, 1)
        corners *= corners.new_tensor([width, height, width, height])
        kept = (hidden[best], corners, classes[best], confidences[best])
        features, regions, numbers, scores = (values.cpu().numpy() for values in kept)
        return RegionRecord(features, regions, (height, width), numbers, scores)
