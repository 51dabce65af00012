"""Image-text pairs and the tars that hold them, as bytes, and a storage that records what is read."""

import io
import json
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg

from pipeline.data.shards.index import ShardIndex, index_tar
from pipeline.data.shards.manifest import index_shards
from pipeline.data.shards.tar import Tar
from pipeline.data.storage import Storage

Members = dict[str, bytes]  # extension -> content


class Watched(Storage):
    """Storage that records the files that are read, and the requested ranges of others."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.latency = 0.0  # seconds of a ranged read

    @property
    def tars(self) -> list[str]:
        return sorted(name for name in self.names if name.endswith(".tar"))

    def open(self, url: str) -> BinaryIO:
        self.names.append(Path(url).name)
        return super().open(url)

    def read(self, url: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytes:
        if stop is None:
            self.names.append(Path(url).name)
        else:
            self.ranges.append((Path(url).name, start, stop))
            time.sleep(self.latency)
        return super().read(url, start, stop, etag)


def picture(number: int, size: int = 24) -> bytes:
    """Return a JPEG that is unique to `number`."""
    random = np.random.default_rng(number)
    pixels = np.repeat(np.repeat(random.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8), 4, 0), 4, 1)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "444")


def pair(number: int) -> Members:
    """Return a valid pair: an image and three captions."""
    captions = [f"picture {number} shows a thing in way {way}" for way in "abc"]
    return {"jpg": picture(number), "json": json.dumps({"captions": captions}).encode()}


def tar_of(entries: Iterable[tuple], format: int = tarfile.USTAR_FORMAT, encoding: str = "utf-8") -> bytes:
    """Return a tar of (name, content) of regular files, and (name, b"", type, link target) of others, in that order."""
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w", format=format, encoding=encoding) as tar:
        for name, data, *others in entries:
            header = tarfile.TarInfo(name)
            header.size, (header.type, header.linkname) = len(data), others or (tarfile.REGTYPE, "")
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def tar_bytes(samples: dict[str, Members]) -> bytes:
    """Return one tar of `samples` (key -> members)."""
    return tar_of((f"{key}.{name}", data) for key, members in samples.items() for name, data in members.items())


def write_indexed(folder: Path, *shards: dict[str, Members]) -> str:
    """Write and index one tar for each of `shards` (key -> members), and return the folder."""
    folder.mkdir(exist_ok=True)
    for number, samples in enumerate(shards):
        (folder / f"{number:05d}.tar").write_bytes(tar_bytes(samples))
    index_shards(Storage(), str(folder))
    return str(folder)


def members_in(tar: bytes, index: ShardIndex) -> dict[str, bytes]:
    """Return the content of each member of a tar, by its path, as its index locates it."""
    members = [(f"{key}.{m[0]}", *m[1:]) for number, key in enumerate(index.keys) for m in index.members(number)]
    return {name: tar[at : at + size] for name, at, size in members}


def extracted(data: bytes) -> dict[str, bytes]:
    """Return the content of each file of a tar, as `tarfile` reads it."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def index_bytes(data: bytes, name: str = "x.tar", etag: str | None = None) -> ShardIndex:
    """Return the index of a tar's bytes."""
    return index_tar(Tar(io.BytesIO(data), name, len(data), lambda start, stop: data[start:stop]), etag)
