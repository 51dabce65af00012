"""Faults of every kind at random moments of a run over two nodes: it ends with the uninterrupted run's losses.

MOME_CHAOS=30 python -m pytest -s tests/faults/test_chaos.py

Shards, checkpoints and journals are in an object store behind a proxy; metrics go to an MLflow server. After each fault
the test waits for the next step and for evidence that the fault was noticed. It prints recovery times and the goodput:
the fraction of time in which no fault was being recovered from.
"""

import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import pytest

from pipeline.data.storage import join
from pipeline.tracking.journal import Journal
from tests.support.fault_proxy import FaultProxy
from tests.support.mlflow_server import Server
from tests.support.ray_nodes import Cluster, Node, raylets
from tests.support.stores import fill_disk, small_disk
from tests.support.train_process import STAGES, TrainProcess, paced

FAULTS = int(os.environ.get("MOME_CHAOS", "3"))  # about a minute each
STEPS = max(12, 4 * FAULTS)  # steps of each stage
REST = 0.3  # seconds that ranks rest after each step
AWAY = 5.0
STORE_AWAY = 15.0  # retries are logged only after five seconds
Fault = Callable[["Site"], Callable[[], bool]]
HEALTH = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20"}


@dataclass
class Site:
    """The run, and every service and process that can be broken."""

    run: TrainProcess
    cluster: Cluster
    proxy: FaultProxy
    server: Server
    cache: Path  # a separate file system, or empty
    draw: random.Random
    stopped: set[int]  # ranks that must not be woken

    def ranks(self) -> list[psutil.Process]:
        return [rank for rank in self.cluster.ranks() if rank.pid not in self.stopped]

    def restarts(self, cause: str) -> int:
        return self.run.restart_causes().count(cause)

    def count_logged(self, words: str) -> int:
        count = 0
        for file in (file for session in self.cluster.sessions() for file in (session / "logs").glob("**/*")):
            with suppress(FileNotFoundError):
                if file.is_file() and not file.is_symlink():
                    count += file.read_bytes().count(words.encode())
        return count

    def strike(self, number: signal.Signals) -> psutil.Process | None:
        """Send a signal to a random rank and return it; None if the run ended before there was one."""
        while self.run.running():
            self.run.wait_for(self.ranks, "a rank")
            with suppress(IndexError, psutil.NoSuchProcess):
                rank = self.draw.choice(self.ranks())
                rank.send_signal(number)
                return rank
        return None


# ---- faults: each breaks something and returns a condition that is true once it was noticed


def rank_killed(site: Site) -> Callable[[], bool]:
    before = site.restarts("failed")
    site.strike(signal.SIGKILL)
    return lambda: site.restarts("failed") > before


def rank_stopped(site: Site) -> Callable[[], bool]:
    """Stop a rank, and stop it again: the thread that paces the ranks may be about to wake it."""
    before, rank = site.restarts("failed"), site.strike(signal.SIGSTOP)

    def missed() -> bool:
        if rank is not None and site.restarts("failed") == before:
            with suppress(psutil.NoSuchProcess):
                site.stopped.add(rank.pid)
                rank.suspend()
        return rank is None or site.restarts("failed") > before

    site.run.wait_for(missed, "the stopped rank to be missed")
    return lambda: site.restarts("failed") > before


def replaced(site: Site, cause: str, blow: Callable[[Node], object]) -> Callable[[], bool]:
    """Strike the second node (the head stays), wait until its ranks are missed, and start it again."""
    node = site.cluster.others[0]
    before, here = site.restarts(cause), node.ranks()
    blow(node)
    site.run.wait_for(lambda: not here or site.restarts(cause) > before, f"a restart after ranks {cause}")
    node.lose()
    node.start()
    return lambda: len(site.cluster.alive()) == 2


def driver_killed(site: Site) -> Callable[[], bool]:
    """Kill the driver and start the run again, which resumes in a new session."""
    journal = Journal(site.run.journal)
    sessions = len(journal.sessions())
    site.run.kill()
    site.run.start()
    return lambda: len(journal.sessions()) > sessions


def until_missed(site: Site, words: str, pause: float, blow: Callable[[], object]) -> Callable[[], bool]:
    """Repeat a fault every `pause` seconds until the ranks log `words`.

    A single fault may go unnoticed: a rank that is starting or ending does not use what it breaks.
    """
    before, again = site.count_logged(words), 0.0

    def missed() -> bool:
        nonlocal again
        if (is_missed := site.count_logged(words) > before) or time.monotonic() <= again:
            return is_missed
        blow()
        again = time.monotonic() + pause
        return False

    site.run.wait_for(missed, f"the ranks to log {words!r}")
    return lambda: site.count_logged(words) > before


def loader_killed(site: Site) -> Callable[[], bool]:
    def kill() -> None:
        with suppress(psutil.NoSuchProcess):
            children = [child for rank in site.ranks() for child in rank.children(recursive=True)]
            loaders = [child for child in children if any("data.loading.backends" in word for word in child.cmdline())]
            if loaders:
                site.draw.choice(loaders).kill()

    return until_missed(site, "a loader process died", AWAY, kill)


def checkpoint_damaged(site: Site) -> Callable[[], bool]:
    """Flip one byte of the newest checkpoint after a rank was lost, so that the restart reads it next."""
    before = site.count_logged("checkpoint skipped")
    site.run.wait_for(lambda: len(site.run.checkpoints()) > 1 and site.ranks(), "two checkpoints")
    ranks = site.ranks()
    site.strike(signal.SIGKILL)
    site.run.wait_for(lambda: not psutil.wait_procs(ranks, timeout=0.1)[1], "the ranks to end")
    url = site.run.checkpoints()[-1]
    name = next(name for name in site.run.storage.list(url) if name.endswith(".safetensors"))
    data = bytearray(site.run.storage.read(join(url, name)))
    data[site.draw.randrange(len(data))] ^= 1
    site.run.storage.write(join(url, name), bytes(data))
    return lambda: site.count_logged("checkpoint skipped") > before


def mlflow_killed(site: Site) -> Callable[[], bool]:
    missed = site.count_logged("is unavailable")
    site.server.kill()
    time.sleep(AWAY)
    site.run.wait_for(lambda: site.count_logged("is unavailable") > missed, "the server to be missed")
    site.server.start()
    return lambda: True


def disk_full(site: Site) -> Callable[[], bool]:
    """Remove the cached shards, fill the disk, and kill a rank so that the shards are needed again."""
    for copy in site.cache.rglob("*.tar"):
        copy.unlink(missing_ok=True)
    filling = site.cache / "filling"
    fill_disk(filling)
    site.strike(signal.SIGKILL)
    # And again at once: copies that the ranks still had open leave room when these end.
    noticed = until_missed(site, "such shards are read over the network", 0.0, lambda: fill_disk(filling))
    filling.unlink()
    return noticed


KINDS: dict[str, Fault] = {
    "node_lost": lambda site: replaced(site, "failed", Node.lose),
    "store_away": lambda s: until_missed(s, "retrying for", STORE_AWAY + 1.0, lambda: s.proxy.away(STORE_AWAY)),
    "checkpoint_damaged": checkpoint_damaged, "rank_killed": rank_killed,
    "preempted": lambda s: replaced(s, "preempted", lambda node: s.cluster.announce_preemption(node, 600)),
    "driver_killed": driver_killed, "mlflow_killed": mlflow_killed, "loader_killed": loader_killed,
    "rank_stopped": rank_stopped, "disk_full": disk_full,
}  # fmt: skip


def schedule(draw: random.Random, kinds: list[str]) -> list[tuple[int, str]]:
    """Return (step, kind) of each fault: a random moment of each equal part of the run, every kind before any repeats.

    The last part has none: a fault just before the end may go unnoticed.
    """
    part, order = len(STAGES) * STEPS / (FAULTS + 1), kinds[:FAULTS]
    while len(order) < FAULTS:
        order += draw.sample(kinds, len(kinds))
    return [(int(part * (number + draw.uniform(0.1, 0.6))), order[number]) for number in range(FAULTS)]


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("s3", ["moto"], indirect=True)
def test_run_with_every_fault_equals_uninterrupted_run(s3, tmp_path: Path) -> None:
    whole = TrainProcess(tmp_path, "whole", STEPS).start("pipeline.training").finish()
    draw, times = random.Random(5), defaultdict(list)
    with (
        Server(tmp_path) as server,
        raylets([1, 1], {**s3.environment, **HEALTH, "MOME_CACHE": str(tmp_path)}) as cluster,
        FaultProxy(s3.endpoint) as proxy,
        small_disk(tmp_path / "cache") as cache,
    ):
        keys = [f"cluster.max_failures={2 * FAULTS}", f"tracking.uri={server.uri}", "tracking.required=false"]
        keys += [f"storage={{endpoint_url: '{proxy.endpoint}', retry_timeout_seconds: 120}}"]
        keys += ["tracking.flush_seconds=1", "data.loader.num_workers=1"]
        keys += [f"data.cache={{folder: '{cache}', max_bytes: 4000000}}"] if cache else []
        stored = {"environment": cluster.environment, "output": s3.url("runs"), "storage": s3.config}
        run = TrainProcess(tmp_path, "chaos", STEPS, *cluster.elastic, *keys, **stored).start()
        site = Site(run, cluster, proxy, server, cache or tmp_path, draw, set())
        kinds = [kind for kind in KINDS if cache or kind != "disk_full"]
        began = time.monotonic()
        with paced(run, site.ranks, REST):
            for step, name in schedule(draw, kinds):
                run.wait_for(lambda: run.step() >= step and site.ranks(), f"step {step}")  # noqa: B023
                assert run.running(), f"ended before {name}: {run.log_text()[-2000:]}"
                at, reached = time.monotonic(), run.step()
                noticed = KINDS[name](site)
                run.wait_for(lambda: run.step() > reached, f"a step after {name}")  # noqa: B023
                times[name].append(time.monotonic() - at)
                print(f"{name} at step {reached}: a step again after {times[name][-1]:.0f} s", flush=True)
                run.wait_for(noticed, f"{name} to be noticed")
                assert noticed(), f"{name} at step {reached}: the run ended without evidence that it was noticed"
        run.finish()
        wall, spent = time.monotonic() - began, sum(map(sum, times.values()))
        for kind, seconds in sorted(times.items()):
            print(f"{kind:<20} {len(seconds)}  recovered in {median(seconds):.0f} s (longest {max(seconds):.0f} s)")
        print(f"{FAULTS} faults in {wall:.0f} s: goodput {max(0.0, 1 - spent / wall):.0%}")
        assert run.losses() == pytest.approx(whole.losses(), rel=1e-5, abs=0)
    assert sum(map(len, times.values())) == FAULTS
