"""CPU seconds of a process and all it started, from Linux's /proc: what a contender costs, wherever it does its work.

A process that ended is counted by the parent that reaped it, so that a difference of two readings misses nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.errors import ConfigError

TICKS = os.sysconf("SC_CLK_TCK")  # of /proc's clock, a second
_RAY_DAEMONS = ("raylet", "gcs_server", "ray/_private/", "ray/dashboard/", "ray/autoscaler/", "/runtime_env/")


@dataclass(frozen=True)
class CpuSeconds:
    """User and system time. `daemons` are Ray's own processes (scheduler, store, agents); `work` is all else."""

    work: float
    daemons: float

    def __sub__(self, earlier: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(self.work - earlier.work, self.daemons - earlier.daemons)


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    own: float
    reaped: float  # of its children that ended


def tree_cpu_seconds(root: int) -> CpuSeconds:
    """CPU seconds so far of process `root` and its descendants. Raises ConfigError where there is no /proc."""
    work = daemons = 0.0
    for process in _tree(root):
        if process.pid != root and _is_ray_daemon(process.pid):
            daemons += process.own
        else:
            work += process.own
        work += process.reaped
    return CpuSeconds(work, daemons)


def _tree(root: int) -> list[_Process]:
    children: dict[int, list[_Process]] = {}
    found: list[_Process] = []
    for process in _processes():
        children.setdefault(process.parent, []).append(process)
        if process.pid == root:
            found.append(process)
    if not found:
        raise ConfigError("mome bench reads /proc to count CPU time, and this machine has none; it needs Linux")
    for process in found:  # grows while it is read: breadth first
        found.extend(children.get(process.pid, []))
    return found


def _processes() -> list[_Process]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text(errors="replace")
        except OSError:  # it ended just now
            continue
        fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
        user, system, reaped_user, reaped_system = (int(ticks) / TICKS for ticks in fields[11:15])
        found.append(_Process(int(stat.parent.name), int(fields[1]), user + system, reaped_user + reaped_system))
    return found


def _is_ray_daemon(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return False
    return not command.startswith("ray::") and any(part in command for part in _RAY_DAEMONS)
