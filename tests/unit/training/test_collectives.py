"""Collectives of a single rank: they return their input, and no port is open to other machines."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALONE = """
import os, socket
from types import SimpleNamespace
import psutil
from pipeline.training.collectives import Collectives
from pipeline.training.metrics import total_data_counts

collectives = Collectives()
assert collectives.gather_json((1, "a", None)) == [[1, "a", None]]
assert collectives.broadcast_json({"claim": None}) == {"claim": None}
store = collectives.key_value_store()
store.write("heartbeats", "alive")
assert store.read("heartbeats") == {0: "alive"}
assert store.announce("hung", "first") == "first"
assert store.announce("hung", "second") == "first"
assert store.announcement("hung") == "first" and store.announcement("shown") is None
for large in (2**24 + 1, 4 * 10**10 + 1):
    loader = SimpleNamespace(counts=lambda: {"samples/pairs": large})
    assert total_data_counts(loader, {}, collectives) == {"data/samples/pairs": float(large)}
open_to = {c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
assert open_to <= {"127.0.0.1", "::1"}, open_to
collectives.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface has another name elsewhere")
def test_single_rank_opens_no_port_and_counts_every_sample() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
