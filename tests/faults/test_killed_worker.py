"""Contract C4 end to end: a rank killed in the middle of every stage leaves the uninterrupted run's losses."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from campaign import SECONDS, STAGES, Campaign

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
