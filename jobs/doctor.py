"""`mome doctor`: checks of this machine and of the services that a run uses, each with a remedy.

They change nothing, but build DeepSpeed's operators, and write and delete a small object in the run's output. Checks
that may hang, crash or occupy the accelerator run in processes of their own with a time limit.
"""

import ipaddress
import json
import os
import re
import resource
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from jobs.cluster import TOKEN_FILE, address_of, connect, requested_resources
from jobs.console import aligned
from jobs.submit import is_loopback
from pipeline.config.errors import ConfigError, DataError, MomeError, StorageError, TrackingError
from pipeline.config.redaction import redact
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.config.urls import is_local, local_path
from pipeline.data.shards.manifest import load_manifest, parse_pattern, shard_names
from pipeline.data.storage import Storage, join
from pipeline.tracking.locations import configured_uri, journal_folder, tracking_uri
from pipeline.tracking.mlflow_server import HTTP_ERRORS, check_server, http_get
from pipeline.training.deepspeed_engine import load_extensions, use_own_folder

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)$")  # as pyproject.toml writes them
GIB = 2**30
FREE_BYTES, FREE_SHARE = GIB, 0.05  # Ray stops putting objects on a disk that is 95 % full
NCCL_BYTES = GIB  # of shared memory, for eight ranks of a node
OPEN_FILES = 4096
OLDEST_COMPILER = 9  # of g++, for DeepSpeed's operators
RETRY_SECONDS = 20.0  # for the store; a run retries for storage.retry_timeout_seconds
ANSWER_SECONDS = 5.0
CLUSTER_SECONDS = 90.0
SKEW_SECONDS = 60.0  # S3 refuses requests that are 15 minutes off


@dataclass(frozen=True)
class Diagnosis:
    """Result of one check; `remedy` is set if it failed."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    remedy: str = ""


class Failed(Exception):
    """Failure of a check that a run on this machine, or the given config's run, needs: description and remedy."""


class Skipped(Exception):
    """A check that is not needed, or whose target is unknown."""


def run_checks(config: RunConfig | None) -> Iterator[Diagnosis]:
    """Run all checks in the order of their dependencies."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield diagnose("packages", packages)
    yield diagnose("accelerator", accelerator, config)
    yield diagnose("NCCL", collective, "NCCL", count)
    yield diagnose("gloo", collective, "gloo")
    yield diagnose("DeepSpeed operators", operators)
    yield diagnose("shared memory", shared_memory, config, count)
    yield diagnose("temporary disk", disk, Path(tempfile.gettempdir()))  # mostly Ray's
    if config is not None:
        if is_local(config.output):
            yield diagnose("output disk", disk, local_path(config.output))
        else:
            yield diagnose("journal disk", disk, journal_folder(config.folder))
        if config.data.cache.folder is not None:
            yield diagnose("cache disk", disk, local_path(config.data.cache.folder))
    yield diagnose("limits", limits)
    yield diagnose("rendezvous", rendezvous)
    yield diagnose("Ray", ray_cluster, config)
    yield diagnose("Ray token", ray_token, config)
    if config is None:
        yield Diagnosis("storage", "skipped", "give --config to check a run's output and sources")
    else:
        storage = Storage(config.storage).within(RETRY_SECONDS)
        yield diagnose("output", output, config, storage)
        yield from sources(config, storage)
    yield diagnose("MLflow", mlflow, config)
    yield diagnose("clock", clock, config)


def diagnose(name: str, check: Callable[..., str], *arguments: Any) -> Diagnosis:
    """Run a check and return its result."""
    try:
        return Diagnosis(name, "passed", check(*arguments))
    except Failed as failure:
        return Diagnosis(name, "failed", *failure.args)
    except Skipped as reason:
        return Diagnosis(name, "skipped", *reason.args)
    except PackageNotFoundError as error:
        remedy = f"pip install --constraint constraints.txt {error.name}"
        return Diagnosis(name, "failed", f"{error.name} is not installed", remedy)


def packages(requirements: Iterable[str] | None = None, tested: Path = CONSTRAINTS) -> str:
    """Check required packages (default: those of mome's metadata); list those that differ from the tested versions."""
    installed, problems = {}, []
    if requirements is None:
        with suppress(PackageNotFoundError):
            requirements = [line for line in requires("mome") or [] if ";" not in line]
    for name, minimum in [match.groups() for match in map(REQUIREMENT.match, requirements or ()) if match]:
        try:
            installed[name] = version(name)
            if _numbers(installed[name]) < _numbers(minimum):
                problems.append(f"{name} {installed[name]} is older than {minimum}")
        except PackageNotFoundError:
            problems.append(f"{name} is missing")
    if problems:
        raise Failed("; ".join(problems), "pip install --constraint constraints.txt '.[ray]'")
    lines = tested.read_text(encoding="utf-8").splitlines() if tested.is_file() else []
    pairs = [line.split("==", 1) for line in lines if "==" in line and not line.startswith("#")]
    pinned = {name.lower(): number for name, number in pairs}
    differing = [name for name, has in installed.items() if _numbers(has) != _numbers(pinned.get(name, has))]
    others = [f"{name} {installed[name]} (tested: {pinned[name]})" for name in differing]
    state = f"; not as tested: {', '.join(others)}" if others else ", all as tested" if pinned else ""
    main_ones = [f"{name} {installed[name]}" for name in ("torch", "deepspeed", "ray", "mlflow") if name in installed]
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{', '.join([f'Python {python}', *main_ones])}; {len(installed)} packages{state}"


def _numbers(version: str) -> tuple[int, ...]:
    """Return (2, 13) for `2.13.0+cpu`: builds of a version are equal, and so are 3.1 and 3.1.0."""
    release = re.sub(r"(\D0+)+$", "", version.split("+")[0])
    return tuple(int(number) for number in re.findall(r"\d+", release))


def _size(count: float) -> str:
    unit, size = ("GiB", GIB) if count >= GIB / 10 else ("MiB", 2**20)
    return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"


def disk(folder: Path, needed: int = FREE_BYTES) -> str:
    """Check that the disk of `folder`, which may not exist yet, has `needed` bytes free and is not nearly full."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise Failed(f"{existing} is not a writable folder", "use another folder, or change its permissions")
    usage = shutil.disk_usage(existing)
    detail = f"{folder}: {_size(usage.free)} of {_size(usage.total)} free"
    enough = max(needed, FREE_SHARE * usage.total)
    if usage.free < enough:
        raise Failed(detail, f"free {_size(enough)} there, or use another folder")
    return detail


def shared_memory(config: RunConfig | None, accelerators: int, place: Path = Path("/dev/shm")) -> str:
    """Check the room for NCCL and the loader processes' batches, without which they die of a bus error."""
    needed = NCCL_BYTES if accelerators else 0
    if config is not None and config.data.loader.num_workers:
        ranks = min(accelerators or config.cluster.workers, config.cluster.workers)
        sizes = [(stage.image_size or config.model.image_size, stage.global_batch_size) for stage in config.stages]
        pixels = max(3 * side**2 * batch for side, batch in sizes)
        needed += (config.data.loader.prefetch_batches + 1) * pixels * ranks // config.cluster.workers
    if not place.is_dir():
        raise Failed(f"{place} is missing", "mount a tmpfs there")
    free = shutil.disk_usage(place).free
    detail = f"{place}: {_size(free)} free, {_size(needed) if needed else 'none'} needed"
    if free >= needed:
        return detail
    remedy = "docker run --shm-size=…, in Kubernetes an emptyDir of medium Memory at /dev/shm"
    raise Failed(detail, f"containers have 64 MiB by default: {remedy}; or reduce data.loader.num_workers")


def limits(adapters: Path = Path("/sys/class/infiniband")) -> str:
    """Check the limits of open files (shards, connections, Ray's sockets) and, for InfiniBand, of locked memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    detail = f"{soft} files may be open" + (
        "" if hard == soft else f", the hard limit is {'none' if unlimited else hard}"
    )
    faults = {}  # description -> remedy
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        faults[detail] = "ulimit -n 65536 in the shell that starts Ray or the ranks"
    names = ", ".join(sorted(path.name for path in adapters.iterdir())) if adapters.is_dir() else ""
    lockable, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if names and lockable != resource.RLIM_INFINITY:
        remedy = "ulimit -l unlimited; docker run --ulimit memlock=-1 --cap-add IPC_LOCK"
        faults[f"{names}, and only {lockable} bytes may be locked"] = remedy
    if faults:
        raise Failed("; ".join(faults), "; ".join(faults.values()))
    return f"{detail}; {names or 'no InfiniBand or EFA adapter'} here"


def rendezvous() -> str:
    """Report the address where ranks of several machines meet, with a warning if it is public."""
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)})
    except OSError as error:
        raise Skipped(f"{host} has no address: {error}") from error
    public = ", ".join(address for address in addresses if ipaddress.ip_address(address).is_global)
    if not public:
        return f"{host} is {', '.join(addresses)}, not a public address"
    risk = "Ranks accept commands from any machine that reaches their ports"
    return f"{host} is {public}: WARNING, a public address. {risk}: keep the nodes in a private network or firewalled"


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
        seen = f"the driver sees {len(gpus)} ({gpus[0]}); torch"
        if built is None:
            remedy = "install torch's CUDA build: pip install --force-reinstall torch, from an index that has it"
            raise Failed(f"{seen} {torch.__version__} has no CUDA", remedy)
        remedy = "update the driver, or install torch for an older CUDA; give a container access to the GPUs"
        raise Failed(f"{seen} for CUDA {built} cannot use it", remedy)
    per_rank = config.cluster.gpus_per_worker if config else 0.0
    is_here = config is not None and address_of(config.cluster) is None  # where the run's ranks are placed
    if not is_usable:
        if per_rank and is_here:
            remedy = "run on a machine with GPUs, give cluster.address, or set cluster.gpus_per_worker=0"
            raise Failed("none, but cluster.gpus_per_worker is not 0", remedy)
        raise Skipped(f"none here; {'the run uses those of its cluster' if per_rank else 'ranks run on CPU'}")
    count, (major, minor) = torch.cuda.device_count(), torch.cuda.get_device_capability()
    detail = f"{count} x {torch.cuda.get_device_name()}, compute {major}.{minor}, CUDA {built}"
    detail += f", driver {gpus[0].split(',')[-1].strip()}" if gpus else ""
    if config is not None and config.engine.precision == "bfloat16" and not torch.cuda.is_bf16_supported(False):
        raise Failed(f"{detail}: no bfloat16", "set engine.precision=float32")
    if config is not None and is_here and config.cluster.workers * per_rank > count:
        remedy = f"set cluster.workers={int(count / per_rank)}, or give cluster.address"
        raise Failed(f"{detail}: the run needs {config.cluster.workers * per_rank:g}", remedy)
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
        return f"{ranks} rank{'s' * (ranks > 1)} on this machine, {run_probes(['collective'], 90.0, environments)}"
    except RuntimeError as error:
        remedy = "NCCL_DEBUG=INFO shows more; " if name == "NCCL" else ""
        remedy += f"{name.upper()}_SOCKET_IFNAME must name an existing interface, if it is set (see ip link)"
        raise Failed(
            f"{ranks} rank{'s' * (ranks > 1)} on this machine could not sum a tensor: {error}", remedy
        ) from error


def operators() -> str:
    """Load DeepSpeed's operators for CPU ranks, building them if necessary; a failure names a fault of the compiler."""
    installed, folder, began = version("deepspeed"), Path(use_own_folder()), time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = "set TORCH_EXTENSIONS_DIR to a folder that allows writing and execution"
        raise Failed(f"{folder} cannot be written ({error.strerror})", remedy) from error
    try:
        run_probes(["operators"], 300.0)
    except RuntimeError as error:
        compiler, number = os.environ.get("CXX", "c++"), ""
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True)
            number = done.stdout.strip().split(".")[0]
        fault, remedy = str(error), f"delete {folder} and try again; see the compiler's output"
        if not number.isdigit():
            fault, remedy = f"no C++ compiler ({compiler})", "apt-get install g++, or set CXX"
        elif "clang" not in compiler and int(number) < OLDEST_COMPILER:
            fault, remedy = f"{compiler} {number} is older than {OLDEST_COMPILER}", "install a newer g++ and set CXX"
        elif not (shutil.which("ninja") or (Path(sys.executable).parent / "ninja").exists()):
            fault, remedy = "ninja is missing", "pip install ninja"
        raise Failed(f"{installed} in {folder}: {fault}", remedy) from error
    return f"{installed}, loaded from {folder} in {time.monotonic() - began:.0f} s"


def output(config: RunConfig, storage: Storage) -> str:
    """Write, read, list and delete a small object in the run's output folder."""
    from pipeline.training.preflight import check_storage  # heavy, and not needed by the probes' processes

    started = time.monotonic()
    try:
        check_storage(storage, config.output, f"mome-doctor-{secrets.token_hex(4)}", num_bytes=1024)
    except (OSError, ConfigError) as error:
        is_store = isinstance(error, MomeError)
        remedy = "check the config's `storage` section" if is_store else "set `output` to a writable folder"
        raise Failed(f"{config.output}: {error}", remedy) from error
    return f"{config.output}: written, listed, read and deleted in {1000 * (time.monotonic() - started):.3g} ms"


def source(config: RunConfig, storage: Storage, url: str) -> str:
    """Check a folder's manifest and the first bytes of its first shard; a generated folder may be missing."""
    is_generated = any(s.shards == url and s.synthetic is not None for s in config.sources.values())
    try:
        folder = parse_pattern(url).folder
        try:
            manifest = load_manifest(storage, url)
            shards = [shard.name for shard in manifest.shards]
            detail = f"{url}: {manifest.num_samples:,} samples in {len(shards):,} shard{'s' * (len(shards) > 1)}"
        except DataError:
            shards = shard_names(url, storage.list_info(folder))
            if not shards:
                raise
            detail = f"{url}: {len(shards)} tars, not indexed yet: the run will index them"
        if shards and not storage.read(join(folder, shards[0]), 0, 512):
            raise Failed(f"{url}: {shards[0]} is empty", "run `mome shards check`")
    except (StorageError, ConfigError, DataError) as error:
        if not is_generated:
            remedy = "correct sources.….shards, or use `mome shards build` and `mome shards check`"
            raise Failed(str(error), remedy) from error
        shards = []
    return detail if shards or not is_generated else f"{url}: generated when the run starts"


def sources(config: RunConfig, storage: Storage) -> Iterator[Diagnosis]:
    """Check every source. A store that does not answer is one failure of all its sources, after one timeout."""
    names, results = dict[str, list[str]](), dict[str, Diagnosis]()  # by URL
    failed_stores: dict[str, str] = {}  # protocol and bucket -> the first of its URLs
    for name, used in config.sources.items():
        url = used.shards
        store = "" if is_local(url) else "/".join(url.split("/")[:3])
        url = failed_stores.get(store, url)
        names.setdefault(url, []).append(name)
        if url in results:
            continue
        try:
            results[url] = Diagnosis("source", "passed", source(config, storage, url))
        except Failed as failure:
            results[url] = Diagnosis("source", "failed", *failure.args)
            if store and type(failure.__cause__) is StorageError:  # not NotFound
                failed_stores[store] = url
    for url, result in results.items():
        yield replace(result, detail=f"{', '.join(names[url])}: {result.detail}")


def summary(results: Sequence[Diagnosis], width: int) -> str:
    """Return the results as a table of `width` columns, with remedies below failures, and the verdict as last line."""
    lines = []
    for result in results:
        lines.append([result.status, result.name, result.detail])
        lines += [["", "", f"→ {result.remedy}"]] if result.remedy else []
    counts = Counter(result.status for result in results)
    failures = ", ".join(dict.fromkeys(result.name for result in results if result.status == "failed"))
    others = f"{counts['passed']} check{'s' * (counts['passed'] != 1)} passed, {counts['skipped']} skipped"
    verdict = f"ready to train: {others}"
    if failures:
        verdict = f"not ready: {counts['failed']} check{'s' * (counts['failed'] > 1)} failed: {failures}; {others}"
    return "\n".join([aligned(lines, width=width), "", *textwrap.wrap(verdict, width)])


def mlflow(config: RunConfig | None) -> str:
    """Check that the tracking server responds and that its version matches the installed client."""
    client = version("mlflow")
    if config is None:
        raise Skipped(f"{client} is installed; give --config to check a run's server")
    try:
        uri = tracking_uri(config)
        check_server(config, required=True)
    except (TrackingError, ConfigError) as error:
        raise Failed(str(error), "start the server, or correct tracking.uri") from error
    if not uri.startswith(("http://", "https://")):
        return f"{redact(uri)} is writable, client {client}"
    server = ""
    with suppress(*HTTP_ERRORS):
        status, body = http_get(redact(uri).rstrip("/") + "/version", limit=100)
        stated = body.decode(errors="replace").strip()  # empty behind a login or some proxies
        server = stated if status == 200 and re.fullmatch(r"[0-9]+[0-9a-z.+]*", stated) else ""
    major = client.split(".")[0]
    if server and server.split(".")[0] != major:
        remedy = f"run a server of version {major}, or install client {server}"
        raise Failed(f"{redact(uri)} has version {server}, the client has {client}", remedy)
    return f"{redact(uri)} answers, version {server or 'unknown'}, client {client}"


def clock(config: RunConfig | None) -> str:
    """Compare this machine's clock with that of the store or of MLflow: the first HTTP server that states a date."""
    store = (config.storage.endpoint_url if config else None) or os.environ.get("AWS_ENDPOINT_URL")
    for url in (store, configured_uri(config) if config else None):
        if not url or not url.startswith(("http://", "https://")):
            continue
        with suppress(*HTTP_ERRORS, TypeError, ValueError):  # no answer, or a missing or malformed date
            try:
                with urllib.request.urlopen(redact(url), timeout=ANSWER_SECONDS) as answer:
                    date = answer.headers["Date"]
            except urllib.error.HTTPError as error:  # an error response has a date, too
                date = error.headers["Date"]
            skew = time.time() - parsedate_to_datetime(date).timestamp()
            detail = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {redact(url)}"
            if abs(skew) > SKEW_SECONDS:
                raise Failed(detail, "run NTP (chrony, systemd-timesyncd): S3 tolerates 15 minutes")
            return detail
    raise Skipped("no server to compare with")


def ray_cluster(config: RunConfig | None) -> str:
    """Check that the configured cluster responds, and compare its resources with the run's request."""
    cluster = config.cluster if config else ClusterConfig()
    address, _ = address_of(cluster) or (None, "")
    try:
        installed = version("ray")
    except PackageNotFoundError as error:
        if address:
            raise Failed(f"{address} is configured, but Ray is not installed", "pip install 'mome[ray]'") from error
        raise Skipped("not installed; torchrun does not need it") from error
    if not address:
        raise Skipped(f"{installed}; no cluster is configured, so a run starts its own")
    try:
        state = json.loads(run_probes(["cluster", cluster.model_dump_json()], CLUSTER_SECONDS))
    except RuntimeError as error:
        raise Failed(f"{address}: {error}", "run ray start --head there, with this Ray version and token") from error
    offered = state["resources"]
    has = ", ".join(f"{offered.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    needed = requested_resources(cluster, cluster.workers) if config else {}
    missing = ", ".join(f"{number:g} {kind}" for kind, number in needed.items() if number > offered.get(kind, 0))
    waits = f"; the run needs {missing} and waits until nodes (of an autoscaler) join" if missing else ""
    return f"{address}: {state['nodes']} node(s) with {has}, version {state['ray']}{waits}"


def ray_token(config: RunConfig | None) -> str:
    """Check that a Ray token exists if the cluster is on another machine, and that only its owner can read it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "in RAY_AUTH_TOKEN; a file is visible to fewer processes"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or os.path.expanduser(TOKEN_FILE))
    address, _ = address_of(config.cluster if config else ClusterConfig()) or (None, "")
    if not path.is_file():
        if named:
            raise Failed(f"RAY_AUTH_TOKEN_PATH names {path}, which is not a file", "correct or unset it")
        if address and address != "auto" and not is_loopback(address):
            remedy = f"copy the cluster's token to {TOKEN_FILE}, then chmod 600 {TOKEN_FILE}"
            raise Failed(f"none, and the cluster {address} is not on this machine", remedy)
        raise Skipped("none; a cluster on this machine does not need one")
    if not path.read_text(encoding="utf-8").strip():
        raise Failed(f"{path} is empty", "ray get-auth-token --generate, or copy the cluster's")
    # Can the group or all users read the file and enter its parent folders?
    mode, entered = stat.S_IMODE(path.stat().st_mode), [folder.stat().st_mode for folder in path.resolve().parents]
    everybody = mode & stat.S_IROTH and all(folder & stat.S_IXOTH for folder in entered)
    if everybody or (mode & stat.S_IRGRP and all(folder & (stat.S_IXGRP | stat.S_IXOTH) for folder in entered)):
        raise Failed(f"{path} is readable by other users ({mode:o})", f"chmod 600 {path}")
    return f"{path}, readable only by its owner"


def run_probes(task: Sequence[str], seconds: float, environments: Sequence[Mapping[str, str]] = ({},)) -> str:
    """Run `main(*task)` in parallel, once per environment; return the first one's last line, or raise RuntimeError."""
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command, deadline = [sys.executable, "-m", "jobs.doctor", *task], time.monotonic() + seconds
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
