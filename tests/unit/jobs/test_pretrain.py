"""The driver resolves paths, addresses and secrets before ranks are placed, and relays the ranks' alerts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import pretrain as pretraining
from jobs.mailbox import Mailbox
from jobs.pretrain import for_ranks
from jobs.submit import for_cluster
from pipeline.config.load import load_config
from pipeline.config.stored import parse_config
from pipeline.data.storage import Storage
from pipeline.tracking.locations import tracking_uri
from pipeline.training.ownership import Ownership

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


@pytest.mark.parametrize("output", ["runs", "s3://bucket/runs"])
def test_ranks_in_another_folder_use_the_same_mlflow(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "rank").mkdir()
    monkeypatch.chdir(tmp_path / "driver")
    config = load_config(DEMO, [f"output={output}"])
    expected = tracking_uri(config)
    settled = for_ranks(config)
    monkeypatch.chdir(tmp_path / "rank")
    assert tracking_uri(settled) == expected


def test_relative_database_path_is_resolved_for_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(DEMO, ["tracking.uri=sqlite:///mine.db"])
    assert for_ranks(config).tracking.uri == f"sqlite:///{tmp_path}/mine.db"
    assert for_ranks(for_ranks(config)).tracking.uri == f"sqlite:///{tmp_path}/mine.db"


def test_ranks_in_another_folder_read_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settled = for_ranks(load_config(DEMO, ["output=s3://bucket/runs"]))
    assert settled.sources["scenes"].shards == str(tmp_path / "runs/demo-data/scenes")
    assert settled.output == "s3://bucket/runs"
    assert for_ranks(settled) == settled


def test_server_reference_reaches_the_ranks_unresolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVER", raising=False)  # set only on the cluster's nodes
    config = load_config(DEMO, ["tracking.uri=env:SERVER"])

    assert for_ranks(config).tracking.uri == "env:SERVER"
    assert for_cluster(config, same_machine=True).tracking.uri == "env:SERVER"


def test_password_recorded_by_an_earlier_version_is_dropped() -> None:
    values = json.loads(load_config(DEMO).model_dump_json())
    values["tracking"]["uri"] = "http://me:hunter2@server:5000"
    values["storage"]["endpoint_url"] = "http://me:hunter2@store:9000"

    config = parse_config(json.dumps(values), "run.json")

    assert (config.tracking.uri, config.storage.endpoint_url) == ("http://server:5000", "http://store:9000")


def test_driver_prints_alerts_of_ranks_and_open_ones_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def alert(name: str, text: str, **more: bool) -> dict[str, object]:
        return {"level": "WARNING", "text": text, "alert": f"vision/{name}", **more}

    said: list[str] = []
    messages = [
        [alert("itm_collapse", "collapsed"), alert("itc_clamp", "clamped")],
        [{"level": "WARNING", "text": "resuming stage vision at step 130"}],
        [alert("itc_clamp", "over", over=True)],
    ]
    monkeypatch.setattr(pretraining, "notify", lambda text, *_: said.append(text))
    monkeypatch.setattr(Mailbox, "receive", lambda _: messages.pop(0) if messages else [])
    config = load_config(DEMO)
    attempt = pretraining._Attempt(config, Ownership(Storage(), config.folder, "claim"), "claim", None)
    attempt._check()
    attempt._check()
    attempt.report_alerts()
    assert said == [
        "WARNING collapsed",
        "WARNING clamped",
        "WARNING resuming stage vision at step 130",
        "WARNING over",
        "alert not over: collapsed",
    ]
