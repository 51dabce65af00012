"""`mome shards` in this process, and a tiny random detector for `mome shards regions`."""

import json
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from jobs.shards import app

FEATURES = 16  # width of the detector's region features


def run_shards(*arguments: object, fails: type[Exception] | None = None, status: int = 0) -> Result:
    """Run a command and check its exit status, or the type of the error that it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails is not None:
        assert isinstance(result.exception, fails), result.output + repr(result.exception)
    else:
        assert result.exit_code == status, result.output + repr(result.exception)
    return result


def refuses(kind: type[Exception], reason: str, *arguments: object) -> None:
    """Run a command that must raise an error whose message has a match of `reason`."""
    message = str(run_shards(*arguments, fails=kind).exception)
    assert re.search(reason, message), message


def facts_of(*arguments: object, status: int = 0) -> dict[str, Any]:
    """Return the JSON object that a command prints with --json."""
    return json.loads(run_shards(*arguments, "--json", status=status).stdout.splitlines()[-1])


def save_yolos(folder: Path) -> Path:
    """Save a detector of twelve queries."""
    import torch
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=FEATURES, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=12, num_labels=5,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(folder)
    return folder
