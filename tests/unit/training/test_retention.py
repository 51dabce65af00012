"""Which checkpoints stay: the last, every so many steps, the best of each stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import CheckpointConfig, KeepBestConfig
from pipeline.data.storage import Storage
from pipeline.training.checkpoint import COMMIT
from pipeline.training.checkpoint.retention import (
    NOBODY,
    Known,
    folder_name,
    newest_first,
    start_of,
    step_of,
    wanted,
)
from pipeline.training.ownership import Start

LOSS = {100: 3.0, 200: 1.0, 300: 2.0, 400: 1.0, 500: 4.0, 600: 5.0}
BEST = KeepBestConfig(metric="train/loss", mode="min")
WORST = KeepBestConfig(metric="train/loss", mode="max")


def known(step: int, stage: str = "s", url: str | None = None) -> Known:
    return Known(url or str(step), step, stage, {"train/loss": LOSS[step]})


@pytest.mark.parametrize(
    ("config", "stay"),
    [
        ({"keep": 1}, [600]),
        ({"keep": 2}, [500, 600]),
        ({"keep": 9}, [100, 200, 300, 400, 500, 600]),
        ({"keep": 1, "keep_every": 300}, [300, 600]),
        ({"keep": 1, "keep_best": BEST}, [400, 600]),
        ({"keep": 1, "keep_best": WORST}, [600]),
        ({"keep": 2, "keep_every": 200, "keep_best": BEST}, [200, 400, 500, 600]),
    ],
)
def test_the_last_the_periodic_and_the_best_stay(config: dict[str, Any], stay: list[int]) -> None:
    found = [known(step) for step in LOSS]
    assert sorted(map(int, wanted(found, known(600), CheckpointConfig(**config)))) == stay


def test_the_best_is_that_of_each_stage() -> None:
    found = [known(step, "first" if step <= 300 else "second") for step in LOSS]
    chosen = wanted(found, known(600, "second"), CheckpointConfig(keep=1, keep_best=BEST))
    assert chosen == {"200", "400", "600"}


def test_what_has_not_the_metric_is_not_the_best() -> None:
    found = [known(100), Known("200", 200, "s", {"train/loss_itc": 0.0}), known(300)]
    assert wanted(found, known(300), CheckpointConfig(keep=1, keep_best=BEST)) == {"300"}


def test_one_of_the_same_step_is_replaced_by_the_newest() -> None:
    """It is the damaged one that the run fell back from: were it counted among the last, a whole one would go."""
    found = [known(100), known(200, url="damaged"), known(200, url="again")]
    chosen = wanted(found, known(200, url="again"), CheckpointConfig(keep=2))
    assert chosen == {"100", "again"}


def test_one_that_is_not_whole_takes_no_place_of_one_that_is() -> None:
    found = [known(100), known(200), replace(known(300), is_whole=False), known(400)]
    assert wanted(found, known(400), CheckpointConfig(keep=2)) == {"200", "400"}


def test_checkpoints_are_ordered_by_step_then_start_then_time(tmp_path: Path) -> None:
    """Not as text: 99,999,999 is before 100,000,000, and start 10,000 after start 9,999."""
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
    found = [url.rpartition("/")[2] for url in newest_first(Storage(), str(tmp_path))]
    assert found == ordered[::-1]


def test_a_name_tells_the_step_and_the_start() -> None:
    start = Start(12345, "0a1b2c3d")
    assert (step_of(folder_name(150, start)), start_of(folder_name(150, start))) == (150, start)
    assert (step_of(folder_name(150, None)), start_of(folder_name(150, None))) == (150, NOBODY)
    assert Start(9999, "ff") < Start(10000, "00")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000150.0003-9f86d081-19ad3c7f2e1", 150),
        ("step-00000150.0003-9f86d081", None),
        ("step-00000150.3f9a", 150),
        ("step-123456789.3f9a00ff", 123456789),
        ("step-00000150.copy", None),
        ("step-00000150", None),
        ("step-150.3f9a", None),
        ("my-step-00000150.3f9a", None),
        ("notes", None),
    ],
)
def test_only_our_names_are_ours(name: str, step: int | None) -> None:
    assert step_of(name) == step
