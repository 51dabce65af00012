"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.errors import ConfigError
from pipeline.config.urls import parse


def local_file(value: str) -> Path:
    """Return a local path; a URL is an error, because pathlib would create a local folder named `s3:`."""
    try:
        protocol, path = parse(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if protocol != "file":
        raise typer.BadParameter(f"{value!r}: expected a file or folder of this machine, not a URL of a store")
    return Path(path)


Config = Annotated[Path, typer.Argument(parser=local_file, help="YAML config of a run, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys to change: stages.vision.steps=100 cluster.workers=4", metavar="KEY=VALUE"),
]
Checkpoint = Annotated[str, typer.Argument(help="Folder of a run, of a stage or of a checkpoint (path or URL).")]
Run = Annotated[str, typer.Argument(help="Folder of a run (path or URL).")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of ranks on the run's Ray cluster that share the work (default: this process alone)."
    ),
]
OwnConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        parser=local_file,
        help="Your own config, whose storage, MLflow and Ray addresses are used; those in the run's folder never are "
        "(default: the environment, AWS_*, MLFLOW_TRACKING_URI and RAY_ADDRESS).",
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option("--uri", help="URL of the MLflow server (default: MLFLOW_TRACKING_URI, or SQLite next to the run)."),
]
Track = Annotated[
    bool | None,
    typer.Option(
        "--track/--no-track",
        help="Record the result in MLflow (default: only if the folder is not a copy and its run was tracked there).",
    ),
]
Address = Annotated[
    str,
    typer.Option(help="URL of the cluster's dashboard, such as http://head:8265.", envvar="RAY_API_SERVER_ADDRESS"),
]
Token = Annotated[
    str | None, typer.Option(help="Reference to the cluster's token: env:NAME or file:PATH (default: Ray's own).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
