"""Contract C4 end to end: a rank killed in the middle of every stage leaves the uninterrupted run's losses.

And in MLflow one run with a child a stage, each step once.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from campaign import SECONDS, STAGES, Campaign
from mlflow import MlflowClient

from pipeline.data.shards.manifest import load_manifest
from pipeline.data.storage import Storage

STEPS = 12


@pytest.mark.timeout(1200)
def test_a_rank_killed_in_every_stage_changes_no_loss(tmp_path: Path) -> None:
    whole = Campaign(tmp_path, "whole", STEPS)
    whole.start().finish()
    killed = Campaign(tmp_path, "killed", STEPS).start()
    deadline = time.monotonic() + SECONDS
    kills = 0
    while kills < len(STAGES) and killed.running() and time.monotonic() < deadline:
        stage, step = killed.reached()
        if stage == kills and step >= kills * STEPS + 6 and (ranks := killed.ranks()):
            ranks[kills % len(ranks)].send_signal(signal.SIGKILL)
            kills += 1
        time.sleep(0.02)
    killed.finish()
    assert kills == len(STAGES)
    assert len(whole.losses()) == len(STAGES) * STEPS
    assert killed.losses() == whole.losses()
    assert killed.causes() == ["failed"] * kills
    assert_tracked_once(killed, tmp_path)


def assert_tracked_once(run: Campaign, folder: Path) -> None:
    """A parent and three children, all found by their data's digest, with each journaled step once and in order."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (each for each in client.search_experiments() if each.name == "vlmo")
    digest = load_manifest(Storage(), f"{folder}/scenes").digest[:36]
    found = client.search_runs([experiment.experiment_id], filter_string=f"dataset.digest = '{digest}'")
    (parent,) = (each for each in found if each.data.tags["mome.role"] == "campaign" and each.info.run_name == run.name)
    children = [each for each in found if each.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(each.info.run_name for each in children) == sorted(STAGES)
    assert parent.data.tags["attempt"] == str(len(STAGES) + 1)
    for child in children:
        assert child.info.status == "FINISHED"
        points = client.get_metric_history(child.info.run_id, "train/loss")
        stage = int(child.data.tags["stage_index"])
        expected = {step: loss for (index, step), loss in run.losses().items() if index == stage}
        assert len(points) == len(expected)
        assert {point.step: point.value for point in points} == expected
        kept = client.search_logged_models(
            [experiment.experiment_id], filter_string=f"tags.`mome.run` = '{parent.data.tags['mome.run']}'"
        )
        assert [each.tags["mome.role"] for each in kept].count("hand_over") == len(STAGES)
