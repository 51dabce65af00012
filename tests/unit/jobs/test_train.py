"""The driver resolves paths, addresses and secrets before ranks are placed, and relays the ranks' alerts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs import train
from jobs.cluster import for_ranks
from jobs.mailbox import Mailbox
from jobs.submit import for_cluster
from jobs.train import RankMessages
from pipeline.config.load import load_config
from pipeline.config.stored import parse_config
from pipeline.tracking.locations import absolute_uri, tracking_uri

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


@pytest.mark.parametrize("override", ["output=runs", "output=s3://bucket/runs", "tracking.uri=sqlite:///mine.db"])
def test_ranks_in_another_folder_use_the_same_files_and_mlflow(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rank").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(DEMO, [override])
    expected = absolute_uri(tracking_uri(config))
    settled = for_ranks(config)
    monkeypatch.chdir(tmp_path / "rank")
    assert tracking_uri(settled) == expected
    assert settled.sources["scenes"].shards == str(tmp_path / "runs/demo-data/scenes")
    assert settled.output == ("s3://bucket/runs" if "s3" in override else str(tmp_path / "runs"))
    if "sqlite" in override:
        assert settled.tracking.uri == f"sqlite:///{tmp_path}/mine.db"
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


def test_driver_prints_alerts_of_ranks_and_open_ones_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def alert(name: str, text: str, **more: bool) -> dict[str, object]:
        return {"level": "WARNING", "text": text, "alert": f"vision/{name}", **more}

    printed: list[str] = []
    received = [
        [alert("itm_collapse", "collapsed"), alert("itc_clamp", "clamped")],
        [{"level": "WARNING", "text": "resuming stage vision at step 130"}],
        [alert("itc_clamp", "over", over=True)],
    ]
    monkeypatch.setattr(train, "notify", lambda text, *_: printed.append(text))
    monkeypatch.setattr(Mailbox, "receive", lambda _: received.pop(0) if received else [])
    messages = RankMessages(Mailbox("start"))
    messages.show()
    messages.show()
    messages.close()
    assert printed == [
        "WARNING collapsed",
        "WARNING clamped",
        "WARNING resuming stage vision at step 130",
        "WARNING over",
        "alert not over: collapsed",
    ]
