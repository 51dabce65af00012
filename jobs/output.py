"""Files that a command was told to write: they never take the place of something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TextIO

from pipeline.config.errors import ConfigError
from pipeline.data.storage import Storage

HEAD = 8192  # bytes in which a page or picture bears its signature (`pipeline.pages.page.signature`)
_SIGNATURE = re.compile(rb"mome [0-9a-f]{32}")


def write_output(storage: Storage, url: str, data: bytes, option: str) -> None:
    """Write a page or picture of ours to `url`, which `option` gave, or in the place of an older one of the same.

    Raises ConfigError where another file lies: one that `mome` did not write, or that shows something else.
    """
    if storage.exists(url):
        own = _SIGNATURE.search(data[:HEAD])
        there = _SIGNATURE.search(storage.read(url)[:HEAD])
        if own is None or there is None or own[0] != there[0]:
            kind = "a file that mome did not write" if there is None else "a page or picture of something else"
            raise ConfigError(f"{option} {url}: {kind} lies there and would be lost; give another name, or delete it")
    storage.write(url, data)


def open_findings(path: Path, option: str) -> TextIO:
    """Open a file of findings, one JSON object a line, to write it anew. Raises ConfigError where another file lies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            with path.open("rb") as file:
                begin = file.read(HEAD)
            if begin and not (begin.startswith(b"{") and b'"shard": ' in begin and b'"reason": ' in begin):
                raise ConfigError(
                    f"{option} {path}: a file that mome did not write lies there and would be lost; give another name"
                )
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {path}: it cannot be written ({error.strerror}); give another name") from error
