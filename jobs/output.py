"""Output files named on the command line; they never overwrite an unrelated file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.config.durable import atomic_write
from pipeline.config.errors import ConfigError
from pipeline.data.storage import Storage

HEAD = 8192  # bytes of a page or image that contain its signature (`pipeline.pages.page.signature`)
_SIGNATURE = re.compile(rb"mome [0-9a-f]{32}")
REMEDY = "give another name, or delete it"
_FINDING = {"shard", "key", "stage", "reason"}  # keys of each line of a list of bad samples


def write_output(storage: Storage, url: str, data: bytes, option: str) -> None:
    """Write a page or image of ours to `url`, which `option` named; it may replace an older version of itself.

    Raises ConfigError if another file is there: one that `mome` did not write, or that shows something else.
    """
    check_output(storage, url, option, data)
    storage.write(url, data)


def check_output(storage: Storage, url: str, option: str, data: bytes | None = None) -> None:
    """Raise ConfigError if `write_output` would; without `data`, check what is known before they are computed."""
    if not storage.exists(url):
        return
    stored = _SIGNATURE.search(storage.read(url)[:HEAD])
    own = stored if data is None else _SIGNATURE.search(data[:HEAD])
    if own is None or stored is None or own[0] != stored[0]:
        kind = "a file that mome did not write" if stored is None else "a page or image of something else"
        raise ConfigError(f"{option} {url}: would overwrite {kind}; {REMEDY}")


@contextmanager
def list_of_findings(path: Path, option: str) -> Iterator[BinaryIO]:
    """Yield the file for a list of bad samples, one JSON object per line; it is complete only if the block succeeds.

    It replaces an earlier list. Raises ConfigError before the block if another file is there.
    """
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe
        with path.open("wb") as device:
            yield device
        return
    if path.exists():
        with path.open("rb") as earlier:
            line = earlier.readline(2**20)
        try:
            is_own = not line or json.loads(line).keys() >= _FINDING
        except (ValueError, AttributeError, RecursionError):
            is_own = False
        if not is_own:
            raise ConfigError(f"{option} {path}: would overwrite a file that mome did not write; {REMEDY}")
    with ExitStack() as stack:
        try:
            file = stack.enter_context(atomic_write(path))
        except OSError as error:
            raise ConfigError(f"{option} {path}: cannot be written ({error}); give another name") from error
        yield file
