"""The machine itself: packages, disks, shared memory, limits of the process."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import os
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from jobs.doctor.finding import Finding, fails, gigabytes, not_asked, works
from pipeline.config.schema import RunConfig

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)$")  # as pyproject.toml writes them
FREE_BYTES, FREE_SHARE = 2**30, 0.05  # Ray stops putting objects on a disk that is 95 % full
NCCL_BYTES = 2**30  # of shared memory, for eight ranks of a node
OPEN_FILES = 4096


def packages(requirements: Iterable[str], tested: Path = CONSTRAINTS) -> Finding:
    """Whether every package that mome needs is here and new enough, and which are not the tested versions."""
    installed, wrong = {}, []
    for name, least in [found.groups() for found in map(REQUIREMENT.match, requirements) if found]:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if _numbers(installed[name]) < _numbers(least):
            wrong.append(f"{name} {installed[name]} is older than {least}")
    if wrong:
        return fails("packages", "; ".join(wrong), "pip install --constraint constraints.txt '.[ray]'")
    pinned = _pins(tested)
    differing = [name for name, has in installed.items() if _numbers(has) != _numbers(pinned.get(name, has))]
    others = [f"{name} {installed[name]} (tested: {pinned[name]})" for name in differing]
    told = f"; not as tested: {', '.join(others)}" if others else ", each as tested" if pinned else ""
    python = ".".join(map(str, sys.version_info[:3]))
    return works("packages", f"Python {python}, {len(installed)} packages{told}")


def requirements() -> list[str]:
    """What mome says that it needs, without its extras; nothing when it is not installed as a package."""
    try:
        return [line for line in importlib.metadata.requires("mome") or [] if ";" not in line]
    except importlib.metadata.PackageNotFoundError:
        return []


def _pins(constraints: Path) -> dict[str, str]:
    if not constraints.is_file():
        return {}
    lines = constraints.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {name.lower(): version for name, version in pairs}


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13): builds of one version are equal, and so are 3.1 and 3.1.0."""
    release = [int(number) for number in re.findall(r"\d+", version.split("+")[0])]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)


def disk(name: str, folder: Path, needed: int = FREE_BYTES) -> Finding:
    """Whether `folder`, or where it would be made, has `needed` bytes free and is not about to be full."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return fails(name, f"{existing} is not a folder that can be written", "give another, or its owner's rights")
    usage = shutil.disk_usage(existing)
    told = f"{folder}: {gigabytes(usage.free)} of {gigabytes(usage.total)} free"
    if usage.free < max(needed, FREE_SHARE * usage.total):
        return fails(
            name, told, f"free {gigabytes(max(needed, FREE_SHARE * usage.total))} there, or give another folder"
        )
    return works(name, told)


def shared_memory(needed: int, place: Path = SHARED_MEMORY) -> Finding:
    """Whether `needed` bytes of shared memory are free: loader processes and NCCL die of a bus error otherwise."""
    name = "shared memory"
    if not place.is_dir():
        return fails(name, f"{place} is missing", "mount a tmpfs there")
    free = shutil.disk_usage(place).free
    told = f"{place}: {gigabytes(free)} free, {gigabytes(needed)} needed"
    if free < needed:
        mend = (
            "containers have 64 MiB by default: docker run --shm-size=…, in Kubernetes an emptyDir of medium Memory at "
            "/dev/shm; or set data.loader.num_workers lower"
        )
        return fails(name, told, mend)
    return works(name, told)


def shared_memory_of(config: RunConfig | None, accelerators: int) -> int:
    """Bytes of shared memory that the ranks of a run put on one node: NCCL's, and the rows of loader processes.

    Counted as if all ranks of a machine with `accelerators` were here; without any, all ranks of the run.
    """
    needed = NCCL_BYTES if accelerators else 0
    if config is None or not config.data.loader.num_workers:
        return needed
    ranks = min(accelerators or config.cluster.workers, config.cluster.workers)
    batches = config.data.loader.prefetch_batches + 1
    pixels = max(
        3 * (stage.image_size or config.model.image_size) ** 2 * stage.global_batch_size for stage in config.stages
    )
    return needed + batches * pixels * ranks // config.cluster.workers


def open_files(least: int = OPEN_FILES) -> Finding:
    """Whether the process may open enough files: shards, connections, and Ray's sockets to every other process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    told = f"{soft} may be open, the hard limit is {'none' if hard == resource.RLIM_INFINITY else hard}"
    if soft != resource.RLIM_INFINITY and soft < least:
        return fails("open files", told, "ulimit -n 65536 in the shell that starts Ray or the ranks")
    return works("open files", told)


def rendezvous() -> Finding:
    """Where the ranks of several machines would meet, and a warning where the internet may reach it."""
    name = "meeting point"
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    try:
        addresses = sorted({str(found[4][0]).partition("%")[0] for found in socket.getaddrinfo(host, None)})
    except OSError as error:
        return not_asked(name, f"{host} has no address: {error}")
    public = [address for address in addresses if ipaddress.ip_address(address).is_global]
    if public:
        return works(
            name,
            f"{host} is {', '.join(public)}: WARNING, a public address. Ranks trust whoever reaches their ports: keep "
            "the nodes in a private network, or behind a firewall",
        )
    return works(name, f"{host} is {', '.join(addresses)}, not a public address")


def locked_memory(adapters: Path = INFINIBAND) -> Finding:
    """Whether memory may be registered with InfiniBand adapters, where there are any."""
    names = sorted(path.name for path in adapters.iterdir()) if adapters.is_dir() else []
    if not names:
        return not_asked("locked memory", "no InfiniBand or EFA adapter here")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        mend = "ulimit -l unlimited; docker run --ulimit memlock=-1 --cap-add IPC_LOCK"
        return fails("locked memory", f"{', '.join(names)}, and only {soft} bytes may be locked", mend)
    return works("locked memory", f"{', '.join(names)}, unlimited")
