"""A run is owned by its latest start; restarts by one launcher share its claim and never retake the run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import Superseded
from pipeline.data.storage import Storage
from pipeline.training.ownership import CLAIM_VARIABLE, OWNER_FILE, Ownership, main
from tests.support.short_run import DEMO, short_config

TAKE = """
import sys
from pipeline.data.storage import Storage
from pipeline.training.ownership import Ownership
print(Ownership.take(Storage(), sys.argv[1]).claim)
"""
AGENT = "import subprocess, sys\nfor _ in range(2): subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True)"


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def take(folder: str, claim: str | None = None) -> Ownership:
    return Ownership.take(Storage(), folder, claim)


def test_latest_start_owns_the_run_and_a_superseded_launcher_does_not_retake_it(folder: str) -> None:
    starts = [take(folder, "launcher") for _ in range(12)]
    assert [start.holds() for start in starts] == [False] * 11 + [True]
    assert sorted(start.start for start in starts if start.start) == [start.start for start in starts]
    assert Ownership(Storage(), folder, "launcher").holds(), "the launcher has it, whichever start of its ranks does"
    old, new = take(folder), take(folder)
    assert (old.holds(), new.holds()) == (False, True), "a manual launch always takes the run"
    assert old.claim != new.claim
    with pytest.raises(Superseded, match=f"owned by a later start, on .*/{OWNER_FILE}/"):
        take(folder, "launcher")
    new.check()
    assert not Ownership(Storage(), folder, "launcher").holds()
    assert take(folder, new.claim).holds()


def test_launcher_is_identified_by_the_name_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, command = short_config(str(tmp_path)).folder, [str(DEMO), f"output={tmp_path}", "name=run"]
    monkeypatch.setenv(CLAIM_VARIABLE, "slurm-17-0")
    assert main(command) == 0, "the launcher has not started yet"
    take(folder, "of a run before it")
    assert main(command) == 0, "the launcher has not started yet and may take the run"
    first, again = take(folder), take(folder)
    assert first.claim == again.claim
    assert main(command) == 0
    monkeypatch.setenv(CLAIM_VARIABLE, "slurm-18-0")
    take(folder)
    monkeypatch.setenv(CLAIM_VARIABLE, "slurm-17-0")
    with pytest.raises(Superseded, match=f"start it again with another {CLAIM_VARIABLE}"):
        take(folder)
    assert main(command) == Superseded.exit_status
    monkeypatch.delenv(CLAIM_VARIABLE)
    assert main(command) == 0


def test_ranks_restarted_by_torchrun_share_a_claim(tmp_path: Path) -> None:
    """They are children of one agent. Another torchrun is another launcher, even if its run id is equal."""
    command = [sys.executable, "-c", AGENT, TAKE, str(tmp_path)]
    settings: dict[str, Any] = {"env": {**os.environ, "TORCHELASTIC_RUN_ID": "none"}, "capture_output": True}
    first, second = (subprocess.run(command, text=True, check=True, **settings).stdout.split() for _ in range(2))
    assert [(len(claims), len(set(claims))) for claims in (first, second)] == [(2, 1), (2, 1)]
    assert first[0] != second[0]


def test_one_of_two_simultaneous_starts_owns_the_run(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither start sees the other when it chooses its number."""
    starts, others = Ownership._starts, list[Any]()

    def interleaved(ownership: Ownership) -> list[Any]:
        before = starts(ownership)
        if not others:
            others.append(None)
            others.append(take(folder, "another"))
        return before

    monkeypatch.setattr(Ownership, "_starts", interleaved)
    try:
        is_owner = take(folder, "one").holds()
    except Superseded:
        is_owner = False
    assert others[1].holds() != is_owner
