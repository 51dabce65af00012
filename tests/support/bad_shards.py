"""A folder of pairs with every kind of bad sample, the expected report of each, and ways to break a shard.

    python tests/support/bad_shards.py

prints how webdataset's own reader treats the same shards.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

Members = dict[str, bytes]


@dataclass(frozen=True)
class Runs:
    """Object whose unpickling creates a folder, which proves that a reader executed code from the shard."""

    folder: str

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def good(number: int) -> Members:
    random = np.random.default_rng(number)
    pixels = np.repeat(np.repeat(random.integers(0, 256, (8, 8, 3), dtype=np.uint8), 4, 0), 4, 1)
    captions = [f"picture {number} shows a thing in way {way}" for way in "abc"]
    return {
        "jpg": simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "444"),
        "json": json.dumps({"captions": captions}).encode(),
    }


def _corrupt(data: bytes) -> bytes:
    """Overwrite bytes in a JPEG's pixel data: Pillow decodes it to noise."""
    middle = len(data) * 3 // 4
    return data[:middle] + bytes(range(40)) + data[middle + 40 :]


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (8000, 8000)).save(buffer, "PNG")
    return buffer.getvalue()


def _described(described: object) -> bytes:
    return json.dumps(described).encode()


# kind -> (stage that must report it, function that damages a good pair)
BAD: dict[str, tuple[str, Callable[[Members], Members]]] = {
    "corrupt JPEG": ("image", lambda pair: pair | {"jpg": _corrupt(pair["jpg"])}),
    "truncated JPEG": ("image", lambda pair: pair | {"jpg": pair["jpg"][: len(pair["jpg"]) // 2]}),
    "not an image": ("image", lambda pair: pair | {"jpg": b"<html>404 Not Found</html>"}),
    "empty picture": ("image", lambda pair: pair | {"jpg": b""}),
    "PNG bomb": ("image", lambda pair: {"png": _bomb(), "json": pair["json"]}),
    "missing picture": ("members", lambda pair: {"json": pair["json"]}),
    "missing caption": ("members", lambda pair: {"jpg": pair["jpg"]}),
    "json without caption": ("members", lambda pair: pair | {"json": _described({"score": 1})}),
    "empty caption": ("caption", lambda pair: pair | {"json": _described({"captions": ["fine", " "]})}),
    "no captions in the list": ("caption", lambda pair: pair | {"json": _described({"captions": []})}),
    "captions of a wrong type": ("caption", lambda pair: pair | {"json": _described({"captions": [3, 4]})}),
    "non-UTF-8 text": ("caption", lambda pair: {"jpg": pair["jpg"], "txt": "eine Tür".encode("latin-1")}),
    "non-UTF-8 json": ("caption", lambda pair: pair | {"json": '{"caption": "eine Tür"}'.encode("latin-1")}),
    "broken json": ("members", lambda pair: pair | {"json": pair["json"][:-5]}),
    "json that is no object": ("members", lambda pair: pair | {"json": _described(["a thing"])}),
    "pickled member": ("members", lambda pair: pair | {"pkl": pickle.dumps({"a": 1})}),
    "PyTorch member": ("members", lambda pair: pair | {"pth": b"PK"}),
}
BESIDE, APART = "duplicate key beside", "duplicate key apart"
KINDS = [*BAD, BESIDE, APART]


@dataclass(frozen=True)
class Expected:
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
    offsets = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for number, (extension, data) in enumerate(members.items()):
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                if number == 0:
                    offsets.append(tar.offset + 512)
                tar.addfile(header, io.BytesIO(data))
    return offsets


def plant(folder: Path, shards: int = 5, samples_per_shard: int = 24) -> Planted:
    """Write bad samples among good ones: kind n occurs 1 + n % 3 times, spread over the shards."""
    folder.mkdir(parents=True)
    todo = [kind for number, kind in enumerate(KINDS) for _ in range(1 + number % 3)]
    bad: dict[str, list[Expected]] = {kind: [] for kind in KINDS}
    for shard in range(shards):
        name, mine = f"{shard:05d}.tar", todo[shard::shards]
        samples: list[tuple[str, Members]] = []
        kinds: list[str | None] = []
        for place in range(samples_per_shard):
            number = shard * samples_per_shard + place
            # Every second sample from the third on is bad, until all are placed, so good samples separate them.
            kind = mine.pop(0) if place >= 2 and place % 2 == 0 and mine else None
            key, members = f"s{number:05d}", good(number)
            if kind == BESIDE:
                key = samples[-1][0]
            elif kind == APART:
                key = samples[-2][0]
            elif kind is not None:
                members = BAD[kind][1](members)
            samples.append((key, members))
            kinds.append(kind)
        assert not mine, "more bad samples than places for them"
        offsets = write_tar(folder / name, samples)
        for (key, _), kind, offset in zip(samples, kinds, offsets, strict=True):
            if kind is not None:
                bad[kind].append(Expected(name, key, offset, BAD[kind][0] if kind in BAD else "members"))
    return Planted(str(folder), shards * samples_per_shard, bad)


def _places(path: Path) -> tuple[int, int, int]:
    """Return the offsets of the last sample's second header, of its data, and of the zero blocks."""
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
        return last.offset, last.offset_data, tar.offset


def _replace(path: Path) -> None:
    """Replace the tar by one of equal size that differs in one letter of a caption."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"shows a thing in way a", b"shows a thing in way z", 1))


# Functions of a shard's path that break the whole shard after it was indexed.
BREAKS: dict[str, Callable[[Path], None]] = {
    "cut inside a header": lambda path: os.truncate(path, _places(path)[0] + 200),
    "cut before a member": lambda path: os.truncate(path, _places(path)[0]),
    "cut inside a member's data": lambda path: os.truncate(path, _places(path)[1] + 20),
    "cut before the zero blocks": lambda path: os.truncate(path, _places(path)[2]),
    "cut between the zero blocks": lambda path: os.truncate(path, _places(path)[2] + 512),
    "zero bytes": lambda path: os.truncate(path, 0),
    "replaced by one of its size": _replace,
    "replaced by a larger one": lambda path: write_tar(path, [(f"t{n}", good(n + 500)) for n in range(40)]) and None,
    "missing": lambda path: path.unlink(),
}


def webdataset_outcome(path: Path, expected: list[tuple[str, Members]], handler: Callable) -> str:
    """Return how a usual webdataset pipeline reads one tar whose samples should be `expected`."""
    import webdataset as wds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = wds.WebDataset([str(path)], shardshuffle=False, handler=handler).decode("pil", handler=handler)
        try:
            samples = list(dataset)
        except Exception as error:
            return f"raises {type(error).__name__}"
    parts = [f"{len(samples)} of {len(expected)} samples come"]
    for sample in samples:
        members = {name for name in sample if not name.startswith("__")}
        truths = [set(truth) for key, truth in expected if key == sample["__key__"]]
        if truths and members not in truths:
            parts.append(f"{sample['__key__']} without its {', '.join(sorted(truths[0] - members))}")
    return "silent: " + "; ".join(parts)


def webdataset_table(folder: Path) -> dict[str, tuple[str, str]]:
    """Return kind -> webdataset's behaviour with errors raised, and with a handler that skips them.

    Each kind is tested alone: a bad sample between two good ones, or a break in a tar of three good pairs.
    """
    import webdataset as wds

    table: dict[str, tuple[str, str]] = {}
    handlers = (wds.reraise_exception, wds.ignore_and_continue)
    for number, kind in enumerate([*KINDS, "pickle that runs code", *BREAKS]):
        path = folder / f"{number:02d}.tar"
        samples = [(f"k{n}", good(n)) for n in range(3)]
        ran = folder / f"ran{number}"
        if kind in BAD:
            samples[1] = ("k1", BAD[kind][1](good(1)))
        elif kind in (BESIDE, APART):
            samples.insert(1 if kind == BESIDE else 3, ("k0", good(7)))
        elif kind not in BREAKS:
            samples[1] = ("k1", good(1) | {"pickle": pickle.dumps(Runs(str(ran)))})
        write_tar(path, samples)
        if kind in BREAKS:
            BREAKS[kind](path)
        outcomes = []
        for handler in handlers:
            outcome = webdataset_outcome(path, samples, handler)
            if ran.exists():
                ran.rmdir()
                outcome += ", and the code ran"
            outcomes.append(outcome)
        table[kind] = (outcomes[0], outcomes[1])
    return table


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for kind, (raising, passing) in webdataset_table(Path(temporary)).items():
            print(f"{kind:<28} | {raising:<60} | {passing}")
