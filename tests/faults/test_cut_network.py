"""A node loses its network while its processes live and no connection is closed: the run continues without it (C4)."""

from pathlib import Path

import pytest

from tests.support.ray_nodes import network, raylets, wait_until
from tests.support.train_process import TrainProcess, assert_same_losses, paced

pytestmark = pytest.mark.slow

STEPS, SECONDS = 20, 900


@pytest.mark.timeout(2400)
def test_run_continues_without_an_unreachable_node(tmp_path: Path) -> None:
    with network() as linked:
        if linked is None:
            pytest.skip("network namespaces are not permitted here")
        hosts, cut = linked
        whole = TrainProcess(tmp_path, "whole", STEPS).start_alone()
        whole.finish()
        with raylets([1, 1], hosts=hosts) as cluster:
            keys = [f"cluster.address='{cluster.address}'", "cluster.workers=2", "cluster.min_workers=1"]
            keys += ["cluster.placement=spread", "cluster.start_seconds=20", "cluster.grow_seconds=1"]
            run = TrainProcess(tmp_path, "cut", STEPS, *keys, environment=cluster.environment).start()
            with paced(run, cluster.ranks):
                wait_until(lambda: run.step() > 5 or not run.running(), "the first steps", SECONDS)
                assert [len(node.ranks()) for node in cluster.nodes] == [1, 1], run.log_text()
                cut()
                assert cluster.others[0].ranks(), "its processes are alive; only the network is gone"
            run.finish()
        assert run.restart_causes() == ["failed"]
        assert_same_losses(run.losses(), whole.losses())
