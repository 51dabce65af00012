"""What ranks compute and speak with: accelerator and driver, NCCL, gloo, DeepSpeed's operators.

Whatever may hang, crash or take the accelerator is tried in a process of its own (`child`), which has a deadline.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jobs.cluster import address_of
from jobs.doctor.finding import Finding, fails, not_asked, works
from pipeline.config.schema import RunConfig
from pipeline.training.extensions import use_own_folder

COLLECTIVE_SECONDS = 90.0
BUILD_SECONDS = 300.0
OLDEST_COMPILER = 9  # of g++, for DeepSpeed's operators


def driver() -> list[str]:
    """`name, memory, driver version` of each accelerator that the driver sees; [] without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def accelerator(config: RunConfig | None, seen: list[str]) -> Finding:
    """Whether torch can use what the driver sees, and whether that is what the run asks for here."""
    import torch

    name = "accelerator"
    built = torch.version.cuda
    if seen and built is None:
        mend = "install torch's CUDA build: pip install --force-reinstall torch, from an index that has it"
        return fails(name, f"the driver sees {len(seen)} ({seen[0]}); torch {torch.__version__} is without CUDA", mend)
    if seen and not torch.cuda.is_available():
        mend = "update the driver, or install a torch that is built for an older CUDA; in a container, give it the GPUs"
        return fails(name, f"the driver sees {len(seen)} ({seen[0]}); torch for CUDA {built} cannot use it", mend)
    if torch.cuda.is_available():
        return _usable(name, config, seen)
    asked = config is not None and config.cluster.gpus_per_worker > 0
    if asked and _is_here(config):
        mend = "run it where there are some, give cluster.address, or set cluster.gpus_per_worker=0"
        return fails(name, "none, and cluster.gpus_per_worker asks for them", mend)
    return not_asked(name, "none here" + ("; the run's are on its cluster" if asked else "; ranks run on CPU"))


def _usable(name: str, config: RunConfig | None, seen: list[str]) -> Finding:
    import torch

    count, (major, minor) = torch.cuda.device_count(), torch.cuda.get_device_capability()
    told = f"{count} x {torch.cuda.get_device_name()}, compute {major}.{minor}, CUDA {torch.version.cuda}"
    told += f", driver {seen[0].split(',')[-1].strip()}" if seen else ""
    if config is not None and config.engine.precision == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        return fails(name, f"{told}: no bfloat16", "set engine.precision=float32")
    here = config is not None and config.cluster.gpus_per_worker > 0 and _is_here(config)
    if here and config is not None and (asked := config.cluster.workers * config.cluster.gpus_per_worker) > count:
        mend = f"set cluster.workers={int(count / config.cluster.gpus_per_worker)}, or give cluster.address"
        return fails(name, f"{told}: the run asks for {asked:g}", mend)
    return works(name, told)


def _is_here(config: RunConfig | None) -> bool:
    """Whether the run's ranks are on this machine."""
    return config is not None and address_of(config.cluster) is None


def gloo() -> Finding:
    """Two ranks on CPU sum something."""
    return _collective("gloo", 2, {"CUDA_VISIBLE_DEVICES": ""})


def nccl(count: int) -> Finding:
    """Up to two ranks, each on a GPU of its own, sum something."""
    if not count:
        return not_asked("NCCL", "no accelerator that torch can use")
    return _collective("NCCL", min(count, 2), {})


def _collective(name: str, ranks: int, extra: dict[str, str]) -> Finding:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes, began = [], time.monotonic()
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(start_child("collective", **place, **extra))
    told, status = "", 0
    for process in processes:
        output, code = finish_child(process, began + COLLECTIVE_SECONDS - time.monotonic())
        if code and not status:
            told, status = output, code
        told = told or output
    if status:
        mend = (
            "NCCL_DEBUG=INFO shows more; " if name == "NCCL" else ""
        ) + f"{name.upper()}_SOCKET_IFNAME names the interface, if it is set wrongly (ip link shows them)"
        return fails(name, f"{ranks} rank(s) on this machine could not sum a tensor: {told}", mend)
    return works(name, f"{ranks} rank(s) on this machine, {told}")


def operators() -> Finding:
    """DeepSpeed's operators for CPU ranks: built if they are not there yet, and loaded."""
    name = "DeepSpeed operators"
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        return fails(name, "DeepSpeed is not installed", "pip install --constraint constraints.txt deepspeed")
    folder = Path(use_own_folder())
    if fault := _folder_fault(folder):
        return fails(name, fault, "set TORCH_EXTENSIONS_DIR to a folder that can be written and run from")
    began = time.monotonic()
    output, status = finish_child(start_child("operators"), BUILD_SECONDS)
    if status:
        fault, mend = _compiler_fault() or (output, f"delete {folder} and try again; the compiler's words are above it")
        return fails(name, f"{installed} in {folder}: {fault}", mend)
    return works(name, f"{installed}, loaded from {folder} in {time.monotonic() - began:.0f} s")


def _folder_fault(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f"trial-{os.getpid()}"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
    return ""


def _compiler_fault() -> tuple[str, str] | None:
    """What is wrong with the tools that build them, and how to mend it."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})", "apt-get install g++, or name one in CXX"
    done = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=False)
    number = done.stdout.strip().split(".")[0]
    if done.returncode or not number.isdigit():
        return f"{compiler} is no C++ compiler", "apt-get install g++, or name one in CXX"
    if "clang" not in compiler and int(number) < OLDEST_COMPILER:
        return f"{compiler} is of version {number}, expected {OLDEST_COMPILER}", "install a newer g++, name it in CXX"
    if not (shutil.which("ninja") or (Path(sys.executable).parent / "ninja").exists()):
        return "ninja is missing", "pip install ninja"
    return None


def start_child(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process of `jobs.doctor.child` that imports the code that this one imports."""
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.doctor.child", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_child(process: subprocess.Popen[str], seconds: float) -> tuple[str, int]:
    """What a child says, or if it fails the last line of its complaint, and its exit status. It ends in time."""
    try:
        output, complaint = process.communicate(timeout=max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "it hung, and was ended", 1
    lines = (output if process.returncode == 0 else complaint or output).strip().splitlines()
    return (lines[-1] if lines else f"it ended with status {process.returncode}"), process.returncode
