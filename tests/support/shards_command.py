"""`mome shards` in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from jobs.shards import app


def run_shards(*arguments: object, fails: type[Exception] | None = None, status: int = 0) -> Result:
    """Run a command and check its exit status, or the type of the error that it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails is not None:
        assert isinstance(result.exception, fails), result.output + repr(result.exception)
    else:
        assert result.exit_code == status, result.output + repr(result.exception)
    return result


def facts_of(*arguments: object, status: int = 0) -> dict[str, Any]:
    """Return the JSON object that a command prints with --json."""
    return json.loads(run_shards(*arguments, "--json", status=status).stdout.splitlines()[-1])
