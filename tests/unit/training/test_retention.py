"""Retention keeps the last checkpoints, one every `keep_every` steps, and the best of each stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import CheckpointConfig, KeepBestConfig
from pipeline.data.storage import Storage
from pipeline.training.checkpoint import COMMIT
from pipeline.training.checkpoint.retention import (
    NO_START,
    CheckpointInfo,
    folder_name,
    newest_first,
    parse_name,
    select_kept,
)
from pipeline.training.ownership import Start

LOSS = {100: 3.0, 200: 1.0, 300: 2.0, 400: 1.0, 500: 4.0, 600: 5.0}
BEST = KeepBestConfig(metric="train/loss", mode="min")
WORST = KeepBestConfig(metric="train/loss", mode="max")


def info(step: int, stage: str = "s", url: str | None = None) -> CheckpointInfo:
    return CheckpointInfo(url or str(step), step, stage, {"train/loss": LOSS[step]})


SIX = [info(step) for step in LOSS]


@pytest.mark.parametrize(
    ("config", "checkpoints", "stay"),
    [
        ({"keep": 1}, SIX, {"600"}),
        ({"keep": 2}, SIX, {"500", "600"}),
        ({"keep": 9}, SIX, {"100", "200", "300", "400", "500", "600"}),
        ({"keep": 1, "keep_every": 300}, SIX, {"300", "600"}),
        ({"keep": 1, "keep_best": BEST}, SIX, {"400", "600"}),
        ({"keep": 1, "keep_best": WORST}, SIX, {"600"}),
        ({"keep": 2, "keep_every": 200, "keep_best": BEST}, SIX, {"200", "400", "500", "600"}),
        ({"keep_best": BEST}, [info(s, "first" if s <= 300 else "second") for s in LOSS], {"200", "400", "600"}),
        (
            {"keep_best": BEST},
            [info(100), CheckpointInfo("200", 200, "s", {"train/loss_itc": 0.0}), info(300)],
            {"300"},
        ),
        # The older one of a step is damaged, and counting it would remove a complete checkpoint.
        ({"keep": 2}, [info(100), info(200, url="damaged"), info(200, url="again")], {"100", "again"}),
        ({"keep": 2}, [info(100), info(200), replace(info(300), is_complete=False), info(400)], {"200", "400"}),
    ],
)
def test_last_periodic_and_best_checkpoints_are_kept(
    config: dict[str, Any], checkpoints: list[CheckpointInfo], stay: set[str]
) -> None:
    assert select_kept(checkpoints, checkpoints[-1], CheckpointConfig(**{"keep": 1} | config)) == stay


def test_checkpoints_are_ordered_by_step_then_start_then_time(tmp_path: Path) -> None:
    """The order is numeric: 99,999,999 precedes 100,000,000, and start 9,999 precedes start 10,000."""
    ordered = [
        "step-00000090.ff",
        "step-99999999.0001-aaaaaaaa-9",
        "step-100000000.ff",
        "step-100000000.fff",
        "step-100000000.0002-bbbbbbbb-10",
        "step-100000000.9999-aaaaaaaa-f",
        "step-100000000.9999-aaaaaaaa-10",
        "step-100000000.10000-00000000-1",
    ]
    for name in (*ordered, "notes.txt", "step-7"):
        Storage().write(str(tmp_path / name / COMMIT), b"")
    checkpoints = [url.rpartition("/")[2] for url in newest_first(Storage(), str(tmp_path))]
    assert checkpoints == ordered[::-1]


def test_step_and_start_are_parsed_from_checkpoint_names_only() -> None:
    for start, writer in ((Start(12345, "0a1b2c3d"), Start(12345, "0a1b2c3d")), (None, NO_START)):
        assert (parse_name(folder_name(150, start)) or ())[:2] == (150, writer)
    for name, step in (
        ("step-00000150.0003-9f86d081-19ad3c7f2e1", 150),
        ("step-00000150.0003-9f86d081", None),
        ("step-00000150.3f9a", 150),
        ("step-123456789.3f9a00ff", 123456789),
        ("step-00000150.copy", None),
        ("step-00000150", None),
        ("step-150.3f9a", None),
        ("my-step-00000150.3f9a", None),
        ("notes", None),
    ):
        assert (parse_name(name) or (None,))[0] == step, name
