"""`mome shards`: import what you have into tar shards, index tars that others made, check them, look at samples."""

from __future__ import annotations

import typer

from jobs.shards.build import build, index
from jobs.shards.check import check
from jobs.shards.regions import regions
from jobs.shards.show import show

app = typer.Typer(
    no_args_is_help=True, help="Build, index, check and look at shards: tars of images, captions and texts."
)
for command in (build, index, check, show, regions):
    app.command()(command)
