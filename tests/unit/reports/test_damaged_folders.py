"""Reading any damaged file of a run or checkpoint raises a MomeError or skips the file."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import MomeError
from pipeline.data.storage import Storage
from pipeline.evaluation.report import render_report
from pipeline.evaluation.report_data import headline, load_report_data, save_report_data
from pipeline.reports.comparison import compare, render_comparison
from pipeline.reports.run_folder import open_run
from pipeline.reports.run_report import collect_report, render_run_report
from pipeline.tracking.locations import read_run_id
from pipeline.training.checkpoint import load_weights, weights_info
from tests.support.finished_run import config_of, draw, write_run
from tests.support.full_report import fullest
from tests.support.fuzz import fuzz_rounds, mutate

ODD = [None, True, -1, 0, 2**70, 1e308, "", "\ud800", "x" * 5000, [], {}, [[]], {"a": 1}, "NaN", "../../x", "\x00"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    shards = draw(folder / "scenes")
    write_run(folder / "run", config_of(folder, {"pairs": {"shards": shards}}, "pairs"), shards)
    return folder / "run"


def with_odd_value(data: bytes, rng: random.Random) -> bytes:
    """Return the JSON with one value replaced, removed or added."""
    values = json.loads(data)
    place: Any = values
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.3 and isinstance(place, dict):
            del place[key]
        else:
            place[key] = rng.choice(ODD)
        break
    return json.dumps(values).encode()


def count_rejected(data: bytes, read: Callable[[bytes], object], rounds: int, seed: int) -> int:
    """Return how many damaged copies raised a MomeError; any other exception fails the test."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(rounds):
        damaged = with_odd_value(data, rng) if rng.random() < 0.7 else mutate(data, rng)
        try:
            read(damaged)
        except MomeError:
            refused += 1
    return refused


def test_damaged_configs_are_rejected(run: Path) -> None:
    file = run / "run.json"
    whole = file.read_bytes()

    def read(data: bytes) -> None:
        file.write_bytes(data)
        opened = open_run(str(run))
        render_run_report(collect_report(opened))

    try:
        assert count_rejected(whole, read, fuzz_rounds(120), 1) > 20
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["time.json", "restarts/0.json", "quarantine/0-pairs.jsonl", "tracking.json"])
def test_other_damaged_files_are_skipped_or_rejected(run: Path, name: str) -> None:
    whole = {
        "time.json": {"at": 1.0, "seconds": {"training": 2.0, "startup": 1.0}, "restarts": 0, "ended": True},
        "restarts/0.json": {"time": 1.0, "cause": "failed", "message": "killed"},
        "quarantine/0-pairs.jsonl": {
            "source": "pairs", "shard": "0.tar", "key": "k", "offset": 0, "stage": "image", "reason": "bad",
        },
        "tracking.json": {"run": "c0ffee", "name": "run"},
    }[name]  # fmt: skip
    file = run / name
    before = file.read_bytes() if file.exists() else None
    file.parent.mkdir(exist_ok=True)

    def read(data: bytes) -> None:
        file.write_bytes(data)
        opened = open_run(str(run))
        render_run_report(collect_report(opened))
        render_comparison(compare([opened, opened]))
        read_run_id(opened.config, Storage())

    try:
        count_rejected(json.dumps(whole).encode(), read, fuzz_rounds(40), 2)
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def test_damaged_evaluations_are_skipped_and_reported(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = fullest()
    small = replace(
        small,
        images={end: cards[:1] for end, cards in small.images.items()},
        sentences={end: cards[:1] for end, cards in small.sentences.items()},
        masked={kind: cards[:1] for kind, cards in small.masked.items()},
        reconstructions=small.reconstructions[:1],
    )
    save_report_data(Storage(), str(run), small)
    (file,) = (run / "evaluations").iterdir()
    config = open_run(str(run)).config
    left_out = 0

    def read(data: bytes) -> None:
        nonlocal left_out
        file.write_bytes(data)
        found = load_report_data(Storage(), str(run))
        left_out += not found
        if found:
            shown = headline(found)
            render_report(shown, config, {}, shown, [(shown, "page.html")])
            render_run_report(collect_report(open_run(str(run))))

    try:
        assert count_rejected(file.read_bytes(), read, fuzz_rounds(100), 3) == 0
    finally:
        file.unlink()
    assert left_out > 20
    assert "skipped" in caplog.text


@pytest.mark.parametrize(
    "address",
    [
        "http://host/beacon",
        "//host/beacon",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "javascript:alert(1)",
        "",
        "file:///etc/passwd",
    ],
)
def test_images_of_a_stored_evaluation_are_data_uris_only(run: Path, address: str) -> None:
    shown = fullest()
    card = replace(shown.images["best"][0], image=address)
    heat = replace(shown.alignments.captions[0], words=[("a", address, 0.5)])
    for hostile in (
        replace(shown, images=shown.images | {"best": [card]}),
        replace(shown, reconstructions=[(address, address, address)]),
        replace(shown, alignments=replace(shown.alignments, captions=[heat])),
    ):
        save_report_data(Storage(), str(run), hostile)
        assert load_report_data(Storage(), str(run)) == []
    for file in (run / "evaluations").iterdir():
        file.unlink()


def recommitted(folder: Path, manifest: bytes) -> None:
    """Write a manifest together with a matching COMMIT.json, as an attacker could."""
    record = {"bytes": len(manifest), "sha256": hashlib.sha256(manifest).hexdigest()}
    (folder / "MANIFEST.json").write_bytes(manifest)
    (folder / "COMMIT.json").write_bytes(json.dumps({"manifest": record}).encode())


def test_damaged_manifests_are_rejected(run: Path) -> None:
    folder = run / "stages" / "0-pairs"
    whole = {name: (folder / name).read_bytes() for name in ("MANIFEST.json", "COMMIT.json")}

    def read(data: bytes) -> None:
        recommitted(folder, data)
        weights_info(Storage(), str(run))
        load_weights(Storage(), str(run))

    def damage_commit(data: bytes) -> None:
        (folder / "COMMIT.json").write_bytes(data)
        weights_info(Storage(), str(run))

    try:
        assert count_rejected(whole["MANIFEST.json"], read, fuzz_rounds(120), 4) > 20
        recommitted(folder, whole["MANIFEST.json"])
        assert count_rejected(whole["COMMIT.json"], damage_commit, fuzz_rounds(60), 5) > 20
    finally:
        for name, data in whole.items():
            (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "a/b", "..", ""])
def test_manifests_may_list_only_files_of_their_folder(run: Path, name: str) -> None:
    folder = run / "stages" / "0-pairs"
    whole = {each: (folder / each).read_bytes() for each in ("MANIFEST.json", "COMMIT.json")}
    values = json.loads(whole["MANIFEST.json"])
    values["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    try:
        recommitted(folder, json.dumps(values).encode())
        with pytest.raises(MomeError, match="not a file name of this folder"):
            load_weights(Storage(), str(run))
    finally:
        for each, data in whole.items():
            (folder / each).write_bytes(data)
