"""URLs of files and folders: put together, taken apart, and refused where reading one would run a program."""

from __future__ import annotations

import os
import re

from pipeline.config.errors import ConfigError

# webdataset's `pipe:` hands the rest to a shell; fsspec's `reference` expands templates that the file itself brings.
_RUNS_SOMETHING = re.compile(r"(^|/)pipe:|^reference:|::reference:")


def join(url: str, *parts: str) -> str:
    """The URL of something inside the folder `url`."""
    return "/".join([url.rstrip("/") or "", *(part.strip("/") for part in parts)])


def split(url: str) -> tuple[str, str]:
    """The folder of a URL and the name inside it."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name


def parse(url: str) -> tuple[str, str]:
    """Protocol, and the path as its backend takes it. Raises ConfigError for a URL that runs a program when read."""
    if _RUNS_SOMETHING.search(url):
        raise ConfigError(
            f"{url!r}: this URL runs a program when it is read, and data may not. "
            "Give where the files lie: a folder, s3://bucket/folder or another storage URL"
        )
    protocol, separator, rest = url.partition("://")
    if not separator or protocol == "file":
        return "file", os.path.expanduser(rest if separator else url)
    if protocol in ("s3", "s3a"):
        return "s3", rest.strip("/")
    return protocol, url
