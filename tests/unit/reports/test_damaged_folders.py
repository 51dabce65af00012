"""Reading any damaged file of a run or checkpoint raises a MomeError or skips the file."""

import hashlib
import json
import random
import shutil
from dataclasses import replace

import pytest

from pipeline.config.errors import MomeError
from pipeline.data.storage import Storage
from pipeline.evaluation.report import Retrievals, headline, load_report_data, render_report, save_report_data
from pipeline.reports.run_folder import open_run
from pipeline.reports.run_report import collect_report, compare, render_comparison, render_run_report
from pipeline.tracking.locations import read_run_id
from pipeline.training.checkpoint.weights import load_weights, weights_info
from tests.support.finished_run import config_of, draw, write_run
from tests.support.full_report import fullest
from tests.support.fuzz import fuzz_rounds, mutate

ODD = [None, True, -1, 0, 2**70, 1e308, "", "\ud800", "x" * 5000, [], {}, [[]], {"a": 1}, "NaN", "../../x", "\x00"]
BAD = {"source": "pairs", "shard": "0.tar", "key": "k", "offset": 0, "stage": "image", "reason": "bad"}
OTHER_FILES = {
    "time.json": {"at": 1.0, "seconds": {"training": 2.0, "startup": 1.0}, "restarts": 0, "ended": True},
    "restarts/0.json": {"time": 1.0, "cause": "failed", "message": "killed"},
    "quarantine/0-pairs.jsonl": BAD, "tracking.json": {"run": "c0ffee", "name": "run"},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    shards = draw(folder / "scenes")
    return write_run(folder / "run", config_of(folder, {"pairs": {"shards": shards}}, "pairs"), shards)


@pytest.fixture
def run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "run")


def count_rejected(data, read, rounds, seed):
    """Return how many damaged copies raised a MomeError; any other exception fails the test.

    A copy has damaged bytes, or one of its JSON values replaced, removed or added.
    """
    rng, rejected = random.Random(seed), 0
    for _ in range(fuzz_rounds(rounds)):
        damaged = mutate(data, rng)
        if rng.random() < 0.7:
            values = place = json.loads(data)
            key = rng.choice(list(place))
            while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
                place = place[key]
                key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if rng.random() < 0.3 and isinstance(place, dict):
                del place[key]
            else:
                place[key] = rng.choice(ODD)
            damaged = json.dumps(values).encode()
        try:
            read(damaged)
        except MomeError:
            rejected += 1
    return rejected


@pytest.mark.parametrize("name", ["run.json", *OTHER_FILES])
def test_damaged_files_of_a_run_are_skipped_or_rejected(run, name):
    file, is_config = run / name, name not in OTHER_FILES
    file.parent.mkdir(exist_ok=True)
    whole = file.read_bytes() if is_config else json.dumps(OTHER_FILES[name]).encode()

    def read(data):
        file.write_bytes(data)
        opened = open_run(str(run))
        render_run_report(collect_report(opened))
        if not is_config:
            render_comparison(compare([opened, opened]))
            read_run_id(opened.config, Storage())

    assert count_rejected(whole, read, 120 if is_config else 40, 1) > (20 if is_config else -1)


def test_damaged_evaluations_are_skipped_and_reported(run, caplog):
    whole, config, skipped = fullest(), open_run(str(run)).config, []
    retrievals = Retrievals(*(cards[:1] for cards in vars(whole.retrievals).values()))
    masked = {kind: cards[:1] for kind, cards in whole.masked.items()}
    few = replace(whole, retrievals=retrievals, masked=masked, reconstructions=whole.reconstructions[:1])
    save_report_data(Storage(), str(run), few)
    (file,), (images,) = ((run / "evaluations").glob(f"*.{kind}") for kind in ("json", "zip"))
    assert b"base64" not in file.read_bytes(), "images are outside the JSON"
    assert len(file.read_bytes()) < len(images.read_bytes()) / 5

    def read(data):
        file.write_bytes(data)
        evaluations = load_report_data(Storage(), str(run))
        skipped.append(not evaluations)
        if evaluations:
            shown = headline(evaluations)
            render_report(shown, config, {}, shown, [(shown, "page.html")])
            render_run_report(collect_report(open_run(str(run))))

    assert count_rejected(file.read_bytes(), read, 100, 3) == 0
    assert (sum(skipped) > 20, "skipped" in caplog.text) == (True, True)
    save_report_data(Storage(), str(run), few)
    assert load_report_data(Storage(), str(run)) == [few]
    packed = images.read_bytes()
    for damaged in (packed[: len(packed) // 2], b"", packed[:300] + bytes([packed[300] ^ 1]) + packed[301:]):
        images.write_bytes(damaged)
        assert load_report_data(Storage(), str(run)) == []


def test_stored_evaluations_are_read_back_unchanged_and_their_images_are_data_uris_only(tmp_path):
    whole, storage, folder = fullest(), Storage(), str(tmp_path)
    for address in (
        "http://host/beacon", "//host/beacon", "data:text/html;base64,AAAA", "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AAAA" onerror="alert(1)', "javascript:alert(1)", "", "file:///etc/passwd",
    ):  # fmt: skip
        card = replace(whole.retrievals.best_images[0], query=address)
        heat = replace(whole.alignments.captions[0], words=[("a", address, 0.5)])
        for hostile in (
            replace(whole, retrievals=replace(whole.retrievals, best_images=[card])),
            replace(whole, reconstructions=[(address, address, address)]),
            replace(whole, alignments=replace(whole.alignments, captions=[heat])),
        ):
            save_report_data(storage, folder, hostile)
            assert load_report_data(storage, folder) == []
    save_report_data(storage, folder, newer := replace(whole, key=replace(whole.key, stage="vision"), at=whole.at + 1))
    save_report_data(storage, folder, whole)
    assert load_report_data(storage, folder) == [newer, whole]
    (tmp_path / "evaluations" / "vision-pairs.json").write_text('{"name": "of another version"}')
    assert load_report_data(storage, folder) == [whole]


def test_damaged_manifests_and_names_outside_the_folder_are_rejected(run):
    folder = run / "stages" / "0-pairs"
    manifest, commit = folder / "MANIFEST.json", folder / "COMMIT.json"
    whole, whole_commit = manifest.read_bytes(), commit.read_bytes()

    def read_commit(data):
        commit.write_bytes(data)
        weights_info(Storage(), str(run))

    def read_manifest(data):
        manifest.write_bytes(data)  # with a matching COMMIT.json, as an attacker could write it
        record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        read_commit(json.dumps({"manifest": record}).encode())
        load_weights(Storage(), str(run))

    assert count_rejected(whole, read_manifest, 120, 4) > 20
    read_manifest(whole)
    assert count_rejected(whole_commit, read_commit, 60, 5) > 20
    for name in ("../../../secret", "/etc/passwd", "a/b", "..", ""):
        values = json.loads(whole)
        values["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        with pytest.raises(MomeError, match="not a file name of this folder"):
            read_manifest(json.dumps(values).encode())
