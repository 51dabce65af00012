"""Whatever a run's or a checkpoint's files hold, reading them ends in one of our errors or leaves the file out."""

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
from pipeline.evaluation.report import ReportLink, render_report
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
    """The same JSON with one value replaced, removed or added somewhere."""
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


def tried(data: bytes, source_type: Callable[[bytes], object], rounds: int, seed: int) -> int:
    """How many damaged copies were refused by one of our errors; anything else that is raised fails the test."""
    rng = random.Random(seed)
    refused = 0
    for _ in range(rounds):
        damaged = with_odd_value(data, rng) if rng.random() < 0.7 else mutate(data, rng)
        try:
            source_type(damaged)
        except MomeError:
            refused += 1
    return refused


def test_a_damaged_config_is_refused_in_our_words(run: Path) -> None:
    file = run / "run.json"
    whole = file.read_bytes()

    def source_type(data: bytes) -> None:
        file.write_bytes(data)
        opened = open_run(str(run))
        render_run_report(collect_report(opened))

    try:
        assert tried(whole, source_type, fuzz_rounds(120), 1) > 20
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["time.json", "restarts/0.json", "quarantine/0-pairs.jsonl", "tracking.json"])
def test_other_damaged_files_of_a_run_are_left_out_or_refused(run: Path, name: str) -> None:
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

    def source_type(data: bytes) -> None:
        file.write_bytes(data)
        opened = open_run(str(run))
        render_run_report(collect_report(opened))
        render_comparison(compare([opened, opened]))
        read_run_id(opened.config, Storage())

    try:
        tried(json.dumps(whole).encode(), source_type, fuzz_rounds(40), 2)
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def test_a_damaged_evaluation_is_left_out_and_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
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

    def source_type(data: bytes) -> None:
        nonlocal left_out
        file.write_bytes(data)
        found = load_report_data(Storage(), str(run))
        left_out += not found
        if found:
            shown = headline(found)
            render_report(shown, config, {}, shown, [ReportLink.of(shown, "page.html")])
            render_run_report(collect_report(open_run(str(run))))

    try:
        assert tried(file.read_bytes(), source_type, fuzz_rounds(100), 3) == 0
    finally:
        file.unlink()
    assert left_out > 20
    assert "is left out" in caplog.text


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
def test_a_picture_of_a_kept_evaluation_is_data_and_no_address(run: Path, address: str) -> None:
    shown = fullest()
    card = replace(shown.images["best"][0], picture=address)
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
    """A manifest that its COMMIT.json vouches for, as somebody else may write both."""
    record = {"bytes": len(manifest), "sha256": hashlib.sha256(manifest).hexdigest()}
    (folder / "MANIFEST.json").write_bytes(manifest)
    (folder / "COMMIT.json").write_bytes(json.dumps({"manifest": record}).encode())


def test_a_damaged_manifest_is_refused_in_our_words(run: Path) -> None:
    folder = run / "stages" / "0-pairs"
    whole = {name: (folder / name).read_bytes() for name in ("MANIFEST.json", "COMMIT.json")}

    def source_type(data: bytes) -> None:
        recommitted(folder, data)
        weights_info(Storage(), str(run))
        load_weights(Storage(), str(run))

    def damage_commit(data: bytes) -> None:
        (folder / "COMMIT.json").write_bytes(data)
        weights_info(Storage(), str(run))

    try:
        assert tried(whole["MANIFEST.json"], source_type, fuzz_rounds(120), 4) > 20
        recommitted(folder, whole["MANIFEST.json"])
        assert tried(whole["COMMIT.json"], damage_commit, fuzz_rounds(60), 5) > 20
    finally:
        for name, data in whole.items():
            (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_lists_files_of_its_own_folder_alone(run: Path, name: str) -> None:
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
