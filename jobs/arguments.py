"""Arguments of the command line that are read in one way by every command."""

from __future__ import annotations

from pathlib import Path

import typer

from pipeline.config.errors import ConfigError
from pipeline.config.urls import parse


def local_file(value: str) -> Path:
    """Return the path of a local file or folder; pathlib would make a local folder of `s3://bucket` too."""
    try:
        protocol, path = parse(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if protocol != "file":
        raise typer.BadParameter(f"{value!r}: expected a file or folder of this machine, not a URL of a store")
    return Path(path)
