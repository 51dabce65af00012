"""Checks of this machine: packages, disks, memory, process limits, accelerators, collectives, DeepSpeed's operators.

Checks that may hang, crash or occupy the accelerator run in their own process (`child`) with a time limit.
"""

from __future__ import annotations

import ipaddress
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from jobs.cluster import address_of
from pipeline.config.schema import RunConfig
from pipeline.training.deepspeed_setup import use_own_folder

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)$")  # as pyproject.toml writes them
GIB = 2**30
FREE_BYTES, FREE_SHARE = GIB, 0.05  # Ray stops putting objects on a disk that is 95 % full
NCCL_BYTES = GIB  # of shared memory, for eight ranks of a node
OPEN_FILES = 4096
COLLECTIVE_SECONDS = 90.0
BUILD_SECONDS = 300.0
OLDEST_COMPILER = 9  # of g++, for DeepSpeed's operators
Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Diagnosis:
    """Result of one check; `remedy` is set if it failed."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def passed(name: str, detail: str) -> Diagnosis:
    return Diagnosis(name, "passed", detail)


def failed(name: str, detail: str, remedy: str) -> Diagnosis:
    """Return the result of a check that a run on this machine, or the given config's run, needs."""
    return Diagnosis(name, "failed", detail, remedy)


def skipped(name: str, detail: str) -> Diagnosis:
    """Return the result of a check that is not needed, or whose target is unknown."""
    return Diagnosis(name, "skipped", detail)


def packages(requirements: Iterable[str] | None = None, tested: Path = CONSTRAINTS) -> Diagnosis:
    """Check that the required packages are installed and recent enough; list those that differ from the tested ones.

    `requirements`: by default those of mome's metadata without extras; none if it is not installed as a package.
    """
    installed, problems = {}, []
    if requirements is None:
        with suppress(PackageNotFoundError):
            requirements = [line for line in requires("mome") or [] if ";" not in line]
    for name, minimum in [match.groups() for match in map(REQUIREMENT.match, requirements or ()) if match]:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            problems.append(f"{name} is missing")
            continue
        if _numbers(installed[name]) < _numbers(minimum):
            problems.append(f"{name} {installed[name]} is older than {minimum}")
    if problems:
        return failed("packages", "; ".join(problems), "pip install --constraint constraints.txt '.[ray]'")
    lines = tested.read_text(encoding="utf-8").splitlines() if tested.is_file() else []
    pairs = [line.split("==", 1) for line in lines if "==" in line and not line.startswith("#")]
    pinned = {name.lower(): number for name, number in pairs}
    differing = [name for name, has in installed.items() if _numbers(has) != _numbers(pinned.get(name, has))]
    others = [f"{name} {installed[name]} (tested: {pinned[name]})" for name in differing]
    versions = f"; not as tested: {', '.join(others)}" if others else ", all as tested" if pinned else ""
    python = ".".join(map(str, sys.version_info[:3]))
    return passed("packages", f"Python {python}, {len(installed)} packages{versions}")


def _numbers(version: str) -> tuple[int, ...]:
    """Return (2, 13) for `2.13.0+cpu`: builds of a version are equal, and so are 3.1 and 3.1.0."""
    release = [int(number) for number in re.findall(r"\d+", version.split("+")[0])]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)


def disk(name: str, folder: Path, needed: int = FREE_BYTES) -> Diagnosis:
    """Check that the disk of `folder`, which may not exist yet, has `needed` bytes free and is not nearly full."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return failed(name, f"{existing} is not a writable folder", "use another folder, or change its permissions")
    usage = shutil.disk_usage(existing)
    detail = f"{folder}: {usage.free / GIB:.1f} GiB of {usage.total / GIB:.1f} GiB free"
    enough = max(needed, FREE_SHARE * usage.total)
    if usage.free < enough:
        return failed(name, detail, f"free {enough / GIB:.1f} GiB there, or use another folder")
    return passed(name, detail)


def shared_memory(needed: int, place: Path = SHARED_MEMORY) -> Diagnosis:
    """Check that `needed` bytes of shared memory are free: otherwise loader processes and NCCL die of a bus error."""
    name = "shared memory"
    if not place.is_dir():
        return failed(name, f"{place} is missing", "mount a tmpfs there")
    free = shutil.disk_usage(place).free
    detail = f"{place}: {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB needed"
    if free < needed:
        remedy = (
            "containers have 64 MiB by default: docker run --shm-size=…, in Kubernetes an emptyDir of medium Memory at "
            "/dev/shm; or reduce data.loader.num_workers"
        )
        return failed(name, detail, remedy)
    return passed(name, detail)


def shared_memory_of(config: RunConfig | None, accelerators: int) -> int:
    """Return the bytes of shared memory that a run needs on one node: NCCL's, and the loader processes' batches.

    Assumes one rank per accelerator of this machine; without accelerators, all ranks of the run.
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


def open_files(minimum: int = OPEN_FILES) -> Diagnosis:
    """Check the limit of open files: shards, connections, and Ray's sockets to every other process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} may be open, the hard limit is {'none' if hard == resource.RLIM_INFINITY else hard}"
    if soft != resource.RLIM_INFINITY and soft < minimum:
        return failed("open files", detail, "ulimit -n 65536 in the shell that starts Ray or the ranks")
    return passed("open files", detail)


def rendezvous() -> Diagnosis:
    """Report the address where ranks of several machines meet, with a warning if it is public."""
    name = "rendezvous"
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)})
    except OSError as error:
        return skipped(name, f"{host} has no address: {error}")
    public = [address for address in addresses if ipaddress.ip_address(address).is_global]
    if public:
        return passed(
            name,
            f"{host} is {', '.join(public)}: WARNING, a public address. Ranks accept commands from any machine that "
            "reaches their ports: keep the nodes in a private network or behind a firewall",
        )
    return passed(name, f"{host} is {', '.join(addresses)}, not a public address")


def locked_memory(adapters: Path = INFINIBAND) -> Diagnosis:
    """Check the limit of locked memory, which InfiniBand adapters need; skipped without adapters."""
    names = sorted(path.name for path in adapters.iterdir()) if adapters.is_dir() else []
    if not names:
        return skipped("locked memory", "no InfiniBand or EFA adapter here")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        remedy = "ulimit -l unlimited; docker run --ulimit memlock=-1 --cap-add IPC_LOCK"
        return failed("locked memory", f"{', '.join(names)}, and only {soft} bytes may be locked", remedy)
    return passed("locked memory", f"{', '.join(names)}, unlimited")


def driver() -> list[str]:
    """Return `name, memory, driver version` of each accelerator that the driver sees; [] without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def accelerator(config: RunConfig | None, gpus: list[str]) -> Diagnosis:
    """Check that torch can use `gpus`, which the driver sees, and that they suffice for a run on this machine."""
    import torch

    name = "accelerator"
    built = torch.version.cuda
    if gpus and built is None:
        remedy = "install torch's CUDA build: pip install --force-reinstall torch, from an index that has it"
        return failed(name, f"the driver sees {len(gpus)} ({gpus[0]}); torch {torch.__version__} has no CUDA", remedy)
    if gpus and not torch.cuda.is_available():
        remedy = "update the driver, or install torch for an older CUDA; give a container access to the GPUs"
        return failed(name, f"the driver sees {len(gpus)} ({gpus[0]}); torch for CUDA {built} cannot use it", remedy)
    needs_gpus = config is not None and config.cluster.gpus_per_worker > 0
    is_here = config is not None and address_of(config.cluster) is None  # where the run's ranks are placed
    if not torch.cuda.is_available():
        if needs_gpus and is_here:
            remedy = "run on a machine with GPUs, give cluster.address, or set cluster.gpus_per_worker=0"
            return failed(name, "none, but cluster.gpus_per_worker is not 0", remedy)
        used = "the run uses those of its cluster" if needs_gpus else "ranks run on CPU"
        return skipped(name, f"none here; {used}")
    count, (major, minor) = torch.cuda.device_count(), torch.cuda.get_device_capability()
    detail = f"{count} x {torch.cuda.get_device_name()}, compute {major}.{minor}, CUDA {built}"
    detail += f", driver {gpus[0].split(',')[-1].strip()}" if gpus else ""
    if config is not None and config.engine.precision == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        return failed(name, f"{detail}: no bfloat16", "set engine.precision=float32")
    if config is not None and needs_gpus and is_here:
        needed = config.cluster.workers * config.cluster.gpus_per_worker
        if needed > count:
            remedy = f"set cluster.workers={int(count / config.cluster.gpus_per_worker)}, or give cluster.address"
            return failed(name, f"{detail}: the run needs {needed:g}", remedy)
    return passed(name, detail)


def collective(name: Literal["gloo", "NCCL"], gpus: int = 0) -> Diagnosis:
    """Sum a tensor: with gloo over two CPU ranks, with NCCL over up to two ranks, each on its own GPU."""
    if name == "NCCL" and not gpus:
        return skipped("NCCL", "no usable accelerator")
    ranks, hidden = (2, {"CUDA_VISIBLE_DEVICES": ""}) if name == "gloo" else (min(gpus, 2), {})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes, began = [], time.monotonic()
    for rank in range(ranks):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **hidden}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(start_probe("collective", **environment))
    results = [finish_probe(process, began + COLLECTIVE_SECONDS - time.monotonic()) for process in processes]
    if faults := [output for output, status in results if status]:
        remedy = "NCCL_DEBUG=INFO shows more; " if name == "NCCL" else ""
        remedy += f"{name.upper()}_SOCKET_IFNAME must name an existing interface, if it is set (see ip link)"
        return failed(name, f"{ranks} rank(s) on this machine could not sum a tensor: {faults[0]}", remedy)
    return passed(name, f"{ranks} rank(s) on this machine, {results[0][0]}")


def operators() -> Diagnosis:
    """Load DeepSpeed's operators for CPU ranks, building them if necessary."""
    name = "DeepSpeed operators"
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        return failed(name, "DeepSpeed is not installed", "pip install --constraint constraints.txt deepspeed")
    folder = Path(use_own_folder())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"trial-{os.getpid()}"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        remedy = "set TORCH_EXTENSIONS_DIR to a folder that allows writing and execution"
        return failed(name, f"{folder} cannot be written ({error.strerror})", remedy)
    began = time.monotonic()
    output, status = finish_probe(start_probe("operators"), BUILD_SECONDS)
    if status:
        fault, remedy = _compiler_fault() or (output, f"delete {folder} and try again; see the compiler's output")
        return failed(name, f"{installed} in {folder}: {fault}", remedy)
    return passed(name, f"{installed}, loaded from {folder} in {time.monotonic() - began:.0f} s")


def _compiler_fault() -> tuple[str, str] | None:
    """Return (fault, remedy) of the compiler or ninja; None if both are usable."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})", "apt-get install g++, or set CXX"
    done = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False)
    number = done.stdout.strip().split(".")[0]
    if done.returncode or not number.isdigit():
        return f"{compiler} is not a C++ compiler", "apt-get install g++, or set CXX"
    if "clang" not in compiler and int(number) < OLDEST_COMPILER:
        return (
            f"{compiler} has version {number}, expected {OLDEST_COMPILER} or newer",
            "install a newer g++ and set CXX",
        )
    if not (shutil.which("ninja") or (Path(sys.executable).parent / "ninja").exists()):
        return "ninja is missing", "pip install ninja"
    return None


def start_probe(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `jobs.doctor.child` with this process's import path."""
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.doctor.child", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_probe(process: subprocess.Popen[str], seconds: float) -> tuple[str, int]:
    """Return (last line of output, or of standard error after a failure; exit status). A hung process is killed."""
    try:
        output, errors = process.communicate(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "it did not finish in time and was killed", 1
    lines = (output if process.returncode == 0 else errors or output).strip().splitlines()
    return (lines[-1] if lines else f"it ended with status {process.returncode}"), process.returncode
