"""Checks of this machine: packages, disks, memory, process limits, accelerators, collectives, DeepSpeed's operators.

A check returns what it found, or raises Failed or Skipped. What may hang, crash or occupy the accelerator runs in
processes of its own (`python -m jobs.machine collective|operators|cluster CONFIG`) with a time limit: the last line of
standard output is the result; after a failure, the last line of standard error is the reason.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from jobs.cluster import address_of, connect
from pipeline.config.errors import MomeError
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.training.deepspeed_setup import load_extensions, use_own_folder

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
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


@dataclass(frozen=True)
class Diagnosis:
    """Result of one check; `remedy` is set if it failed."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    remedy: str = ""


class Failed(Exception):
    """Failure of a check that a run on this machine, or the given config's run, needs: what was found, the remedy."""


class Skipped(Exception):
    """A check that is not needed, or whose target is unknown."""


def diagnose(name: str, check: Callable[[], str]) -> Diagnosis:
    """Run a check and return its result."""
    try:
        return Diagnosis(name, "passed", check())
    except Failed as failure:
        return Diagnosis(name, "failed", *failure.args)
    except Skipped as reason:
        return Diagnosis(name, "skipped", *reason.args)


def packages(requirements: Iterable[str] | None = None, tested: Path = CONSTRAINTS) -> str:
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
        raise Failed("; ".join(problems), "pip install --constraint constraints.txt '.[ray]'")
    lines = tested.read_text(encoding="utf-8").splitlines() if tested.is_file() else []
    pairs = [line.split("==", 1) for line in lines if "==" in line and not line.startswith("#")]
    pinned = {name.lower(): number for name, number in pairs}
    differing = [name for name, has in installed.items() if _numbers(has) != _numbers(pinned.get(name, has))]
    others = [f"{name} {installed[name]} (tested: {pinned[name]})" for name in differing]
    versions = f"; not as tested: {', '.join(others)}" if others else ", all as tested" if pinned else ""
    return f"Python {'.'.join(map(str, sys.version_info[:3]))}, {len(installed)} packages{versions}"


def _numbers(version: str) -> tuple[int, ...]:
    """Return (2, 13) for `2.13.0+cpu`: builds of a version are equal, and so are 3.1 and 3.1.0."""
    release = [int(number) for number in re.findall(r"\d+", version.split("+")[0])]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)


# ---- disks, memory, limits, network


def disk(folder: Path, needed: int = FREE_BYTES) -> str:
    """Check that the disk of `folder`, which may not exist yet, has `needed` bytes free and is not nearly full."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise Failed(f"{existing} is not a writable folder", "use another folder, or change its permissions")
    usage = shutil.disk_usage(existing)
    detail = f"{folder}: {usage.free / GIB:.1f} GiB of {usage.total / GIB:.1f} GiB free"
    enough = max(needed, FREE_SHARE * usage.total)
    if usage.free < enough:
        raise Failed(detail, f"free {enough / GIB:.1f} GiB there, or use another folder")
    return detail


def shared_memory(needed: int, place: Path = SHARED_MEMORY) -> str:
    """Check that `needed` bytes of shared memory are free: otherwise loader processes and NCCL die of a bus error."""
    if not place.is_dir():
        raise Failed(f"{place} is missing", "mount a tmpfs there")
    free = shutil.disk_usage(place).free
    detail = f"{place}: {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB needed"
    if free < needed:
        remedy = (
            "containers have 64 MiB by default: docker run --shm-size=…, in Kubernetes an emptyDir of medium Memory at "
            "/dev/shm; or reduce data.loader.num_workers"
        )
        raise Failed(detail, remedy)
    return detail


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


def open_files() -> str:
    """Check the limit of open files: shards, connections, and Ray's sockets to every other process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} may be open, the hard limit is {'none' if hard == resource.RLIM_INFINITY else hard}"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        raise Failed(detail, "ulimit -n 65536 in the shell that starts Ray or the ranks")
    return detail


def locked_memory(adapters: Path = INFINIBAND) -> str:
    """Check the limit of locked memory, which InfiniBand adapters need; skipped without adapters."""
    names = ", ".join(sorted(path.name for path in adapters.iterdir())) if adapters.is_dir() else ""
    if not names:
        raise Skipped("no InfiniBand or EFA adapter here")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        remedy = "ulimit -l unlimited; docker run --ulimit memlock=-1 --cap-add IPC_LOCK"
        raise Failed(f"{names}, and only {soft} bytes may be locked", remedy)
    return f"{names}, unlimited"


def rendezvous() -> str:
    """Report the address where ranks of several machines meet, with a warning if it is public."""
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)})
    except OSError as error:
        raise Skipped(f"{host} has no address: {error}") from error
    public = [address for address in addresses if ipaddress.ip_address(address).is_global]
    if not public:
        return f"{host} is {', '.join(addresses)}, not a public address"
    return (
        f"{host} is {', '.join(public)}: WARNING, a public address. Ranks accept commands from any machine that "
        "reaches their ports: keep the nodes in a private network or behind a firewall"
    )


# ---- accelerators, collectives, operators


def accelerator(config: RunConfig | None) -> str:
    """Check that torch can use the GPUs that the driver sees, and that they suffice for a run on this machine."""
    import torch

    gpus: list[str] = []  # name, memory, driver version
    with suppress(OSError, subprocess.SubprocessError):  # no driver, or one that fails
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        gpus = [line for line in done.stdout.splitlines() if line.strip()]
    built, is_usable = torch.version.cuda, torch.cuda.is_available()
    if gpus and not is_usable:
        reason, remedy = f"for CUDA {built} cannot use it", "update the driver, or install torch for an older CUDA; "
        remedy += "give a container access to the GPUs"
        if built is None:
            reason = f"{torch.__version__} has no CUDA"
            remedy = "install torch's CUDA build: pip install --force-reinstall torch, from an index that has it"
        raise Failed(f"the driver sees {len(gpus)} ({gpus[0]}); torch {reason}", remedy)
    needs_gpus = config is not None and config.cluster.gpus_per_worker > 0
    is_here = config is not None and address_of(config.cluster) is None  # where the run's ranks are placed
    if not is_usable:
        if needs_gpus and is_here:
            remedy = "run on a machine with GPUs, give cluster.address, or set cluster.gpus_per_worker=0"
            raise Failed("none, but cluster.gpus_per_worker is not 0", remedy)
        raise Skipped(f"none here; {'the run uses those of its cluster' if needs_gpus else 'ranks run on CPU'}")
    count, (major, minor) = torch.cuda.device_count(), torch.cuda.get_device_capability()
    detail = f"{count} x {torch.cuda.get_device_name()}, compute {major}.{minor}, CUDA {built}"
    detail += f", driver {gpus[0].split(',')[-1].strip()}" if gpus else ""
    if config is not None and config.engine.precision == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        raise Failed(f"{detail}: no bfloat16", "set engine.precision=float32")
    if config is not None and needs_gpus and is_here:
        needed = config.cluster.workers * config.cluster.gpus_per_worker
        if needed > count:
            remedy = f"set cluster.workers={int(count / config.cluster.gpus_per_worker)}, or give cluster.address"
            raise Failed(f"{detail}: the run needs {needed:g}", remedy)
    return detail


def collective(name: Literal["gloo", "NCCL"], gpus: int = 0) -> str:
    """Sum a tensor: with gloo over two CPU ranks, with NCCL over up to two ranks, each on its own GPU."""
    if name == "NCCL" and not gpus:
        raise Skipped("no usable accelerator")
    ranks, hidden = (2, {"CUDA_VISIBLE_DEVICES": ""}) if name == "gloo" else (min(gpus, 2), {})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **hidden}
    environments = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(ranks)]
    try:
        result = run_probes(["collective"], COLLECTIVE_SECONDS, environments)
    except RuntimeError as error:
        remedy = "NCCL_DEBUG=INFO shows more; " if name == "NCCL" else ""
        remedy += f"{name.upper()}_SOCKET_IFNAME must name an existing interface, if it is set (see ip link)"
        raise Failed(f"{ranks} rank(s) on this machine could not sum a tensor: {error}", remedy) from error
    return f"{ranks} rank(s) on this machine, {result}"


def operators() -> str:
    """Load DeepSpeed's operators for CPU ranks, building them if necessary."""
    try:
        installed = version("deepspeed")
    except PackageNotFoundError as error:
        remedy = "pip install --constraint constraints.txt deepspeed"
        raise Failed("DeepSpeed is not installed", remedy) from error
    folder = Path(use_own_folder())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"trial-{os.getpid()}"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        remedy = "set TORCH_EXTENSIONS_DIR to a folder that allows writing and execution"
        raise Failed(f"{folder} cannot be written ({error.strerror})", remedy) from error
    began = time.monotonic()
    try:
        run_probes(["operators"], BUILD_SECONDS)
    except RuntimeError as error:
        known = (str(error), f"delete {folder} and try again; see the compiler's output")
        fault, remedy = _compiler_fault() or known
        raise Failed(f"{installed} in {folder}: {fault}", remedy) from error
    return f"{installed}, loaded from {folder} in {time.monotonic() - began:.0f} s"


def _compiler_fault() -> tuple[str, str] | None:
    """Return (fault, remedy) of the compiler or ninja; None if both are usable."""
    compiler, remedy = os.environ.get("CXX", "c++"), "apt-get install g++, or set CXX"
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})", remedy
    done = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False)
    number = done.stdout.strip().split(".")[0]
    if done.returncode or not number.isdigit():
        return f"{compiler} is not a C++ compiler", remedy
    if "clang" not in compiler and int(number) < OLDEST_COMPILER:
        fault = f"{compiler} has version {number}, expected {OLDEST_COMPILER} or newer"
        return fault, "install a newer g++ and set CXX"
    if not (shutil.which("ninja") or (Path(sys.executable).parent / "ninja").exists()):
        return "ninja is missing", "pip install ninja"
    return None


# ---- checks in their own processes


def run_probes(task: Sequence[str], seconds: float, environments: Sequence[Mapping[str, str]] = ({},)) -> str:
    """Run `main(*task)` in one process per environment, at the same time; return what the first one found.

    Raises RuntimeError with the reason of the first that failed; those that hang are killed.
    """
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command, deadline = [sys.executable, "-m", "jobs.machine", *task], time.monotonic() + seconds
    processes = [
        subprocess.Popen(command, env={**own, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for more in environments
    ]
    results, failures = list[str](), list[str]()
    for process in processes:
        try:
            output, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failures.append("it did not finish in time and was killed")
            continue
        lines = (errors or output if process.returncode else output).strip().splitlines()
        last = lines[-1] if lines else f"it ended with status {process.returncode}"
        (failures if process.returncode else results).append(last)
    if failures:
        raise RuntimeError(failures[0])
    return results[0]


def main(task: str, *arguments: str) -> None:
    """Sum a tensor over all ranks, load DeepSpeed's operators, or describe a Ray cluster as JSON."""
    try:
        if task == "collective":
            import torch

            from pipeline.training.collectives import Collectives

            ranks = Collectives(timeout_seconds=60.0)
            total = ranks.sum(torch.full((1024,), float(ranks.rank + 1), device=ranks.device))
            expected = ranks.world_size * (ranks.world_size + 1) / 2
            if not bool((total == expected).all()):
                raise SystemExit(f"the sum is {total[0]:g}, expected {expected:g}")
            nccl = f"{'.'.join(map(str, torch.cuda.nccl.version()))}, " if ranks.device.type == "cuda" else ""
            ranks.close()
            print(f"{nccl}all-reduce verified")
        elif task == "operators":
            load_extensions()
            print("loaded")
        elif task == "cluster":
            import ray

            connect(ClusterConfig.model_validate_json(*arguments))
            nodes = [node for node in ray.nodes() if node["Alive"]]
            print(json.dumps({"nodes": len(nodes), "resources": ray.cluster_resources(), "ray": ray.__version__}))
    except MomeError as error:
        raise SystemExit(" ".join(str(error).split())) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
