"""A folder of pairs with every kind of bad sample, the expected report of each, and ways to break a shard."""

import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pipeline.config.schema import SourceType
from tests.support.data_stream import data_config, open_loader
from tests.support.encoded_images import encoded
from tests.support.pairs import Members, pair, tar_of

# kind -> (stage that must report it, function that damages a good pair)
BAD: dict[str, tuple[str, Callable[[Members], Members]]] = {
    # Bytes in the pixel data are overwritten: Pillow decodes it to noise.
    "corrupt JPEG": ("image", lambda pair: pair | {"jpg": pair["jpg"][:-200] + bytes(range(40)) + pair["jpg"][-160:]}),
    "truncated JPEG": ("image", lambda pair: pair | {"jpg": pair["jpg"][: len(pair["jpg"]) // 2]}),
    "not an image": ("image", lambda pair: pair | {"jpg": b"<html>404 Not Found</html>"}),
    "empty picture": ("image", lambda pair: pair | {"jpg": b""}),
    "PNG bomb": ("image", lambda pair: {"png": encoded(Image.new("1", (8000, 8000)), "PNG"), "json": pair["json"]}),
    "missing picture": ("members", lambda pair: {"json": pair["json"]}),
    "missing caption": ("members", lambda pair: {"jpg": pair["jpg"]}),
    "json without caption": ("members", lambda pair: pair | {"json": b'{"score": 1}'}),
    "empty caption": ("caption", lambda pair: pair | {"json": b'{"captions": ["fine", " "]}'}),
    "no captions in the list": ("caption", lambda pair: pair | {"json": b'{"captions": []}'}),
    "captions of a wrong type": ("caption", lambda pair: pair | {"json": b'{"captions": [3, 4]}'}),
    "non-UTF-8 text": ("caption", lambda pair: {"jpg": pair["jpg"], "txt": "eine Tür".encode("latin-1")}),
    "non-UTF-8 json": ("caption", lambda pair: pair | {"json": '{"caption": "eine Tür"}'.encode("latin-1")}),
    "broken json": ("members", lambda pair: pair | {"json": pair["json"][:-5]}),
    "json that is no object": ("members", lambda pair: pair | {"json": b'["a thing"]'}),
    "pickled member": ("members", lambda pair: pair | {"pkl": pickle.dumps({"a": 1})}),
    "PyTorch member": ("members", lambda pair: pair | {"pth": b"PK"}),
}
BESIDE, APART = "duplicate key beside", "duplicate key apart"
KINDS = [*BAD, BESIDE, APART]


class Expected(NamedTuple):
    """A bad sample as every report must name it."""

    shard: str
    key: str
    offset: int
    stage: str


@dataclass(frozen=True)
class Planted:
    """A folder of `samples` samples that is not indexed, and its bad ones by kind."""

    folder: str
    samples: int
    bad: dict[str, list[Expected]]

    @property
    def expected(self) -> set[Expected]:
        return {sample for samples in self.bad.values() for sample in samples}


def write_tar(path: Path, samples: list[tuple[str, Members]]) -> list[int]:
    """Write keys and members in the given order, repeated keys included; return the offset of each sample's data."""
    path.write_bytes(tar_of((f"{key}.{name}", data) for key, members in samples for name, data in members.items()))
    with tarfile.open(path) as tar:
        offsets = [file.offset_data for file in tar]
    return [offsets[first] for first in accumulate((len(members) for _, members in samples[:-1]), initial=0)]


def plant(folder: Path, shards: int = 5, samples_per_shard: int = 24) -> Planted:
    """Write bad samples among good ones: kind n occurs 1 + n % 3 times, spread over the shards."""
    folder.mkdir(parents=True)
    todo = [kind for number, kind in enumerate(KINDS) for _ in range(1 + number % 3)]
    bad: dict[str, list[Expected]] = {kind: [] for kind in KINDS}
    for shard in range(shards):
        name, mine = f"{shard:05d}.tar", todo[shard::shards]
        samples, kinds = list[tuple[str, Members]](), list[str | None]()
        for place in range(samples_per_shard):
            number = shard * samples_per_shard + place
            # Every second sample from the third on is bad, until all are placed, so good samples separate them.
            kind = mine.pop(0) if place >= 2 and place % 2 == 0 and mine else None
            key = samples[-1 if kind == BESIDE else -2][0] if kind in (BESIDE, APART) else f"s{number:05d}"
            samples.append((key, BAD[kind][1](pair(number)) if kind in BAD else pair(number)))
            kinds.append(kind)
        assert not mine, "more bad samples than places for them"
        for (key, _), kind, offset in zip(samples, kinds, write_tar(folder / name, samples), strict=True):
            if kind is not None:
                bad[kind].append(Expected(name, key, offset, BAD[kind][0] if kind in BAD else "members"))
    return Planted(str(folder), shards * samples_per_shard, bad)


def cut(path: Path, place: str, extra: int = 0) -> None:
    """Cut a tar after its last member's `offset` or `offset_data`, or after all members."""
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
        ends = {"offset": last.offset, "offset_data": last.offset_data, "end": tar.offset}
    os.truncate(path, ends[place] + extra)


# Functions of a shard's path that break the whole shard after it was indexed.
BREAKS: dict[str, Callable[[Path], object]] = {
    "cut inside a header": lambda path: cut(path, "offset", 200),
    "cut before a member": lambda path: cut(path, "offset"),
    "cut inside a member's data": lambda path: cut(path, "offset_data", 20),
    "cut before the zero blocks": lambda path: cut(path, "end"),
    "cut between the zero blocks": lambda path: cut(path, "end", 512),
    "zero bytes": lambda path: os.truncate(path, 0),
    "replaced by one of its size": lambda path: path.write_bytes(path.read_bytes().replace(b"way a", b"way z", 1)),
    "replaced by a larger one": lambda path: write_tar(path, [(f"t{n}", pair(n + 500)) for n in range(40)]),
    "missing": lambda path: path.unlink(),
    "index of another tar": lambda path: shutil.copy(path.with_name("00002.tar.index.npz"), f"{path}.index.npz"),
}


# What a model of each source type needs to read every member: its objectives, model section and stage section.
_SMALL = {"width": 16, "layers": 2, "heads": 2, "image_size": 16, "patch_size": 4}
_VLMO = {"kind": "vlmo", "vision_language_layers": 1}
_IMAGEBERT = {"kind": "imagebert", "region_features": 3, "region_classes": 2, "max_regions": 4}
_READS_ALL: dict[SourceType, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "pairs": (("itc", "mlm", "mim"), _VLMO, {}),
    "text": (("mlm",), _VLMO, {}),
    "labelled": (("classification",), {"kind": "vit"}, {"num_classes": 4}),
    "regions": (("mlm", "moc"), _IMAGEBERT, {}),
    "questions": (("vqa",), _VLMO, {"num_answers": 2}),
    "statements": (("nlvr2",), _VLMO, {}),
}


def read_epoch(folder: object, samples: int, source_type: SourceType = "pairs", streams: int = 1) -> list[dict]:
    """Read all `samples` of an indexed folder through the loader, and return those that it quarantined."""
    objectives, model, stage = _READS_ALL[source_type]
    size = next(size for size in (10, 8, 1) if samples % size == 0)
    stage = stage | {"global_batch_size": size, "steps": samples // size}
    config = data_config({"one": str(folder)}, objectives, source_type, _SMALL | model, {"streams": streams}, stage)
    with open_loader(config) as loader:
        assert sum(len(rows) for rows in islice(loader.batches(0), samples // size)) == samples
        records, counts = loader.quarantined(), loader.counts()
        assert (counts["samples/one"], counts.get("bad/one", 0)) == (samples, len(records))
    return records
