"""`mome doctor`: checks of this machine (`jobs.machine`) and of the services that a run uses, each with a remedy.

The checks change nothing, except that DeepSpeed's operators are built if necessary, and that a small object is written
to the run's output and deleted. `mome train --preflight` checks the ranks and stages of a run.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jobs import machine
from jobs.cluster import address_of, requested_resources
from jobs.dashboard import TOKEN_FILE, is_loopback, token_file
from jobs.machine import Diagnosis, Failed, Skipped, diagnose, run_probes
from pipeline.config.errors import ConfigError, DataError, StorageError, TrackingError
from pipeline.config.redaction import redact
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.config.urls import is_local, local_path
from pipeline.data.shards.manifest import load_manifest, shard_folder, shard_names
from pipeline.data.storage import Storage, join
from pipeline.tracking.locations import configured_uri, journal_folder, tracking_uri
from pipeline.tracking.mlflow_server import HTTP_ERRORS, check_server, http_get
from pipeline.training.preflight import check_storage

RETRY_SECONDS = 20.0  # for the store; a run retries for storage.retry_timeout_seconds
ANSWER_SECONDS = 5.0
CLUSTER_SECONDS = 90.0
SKEW_SECONDS = 60.0  # S3 refuses requests that are 15 minutes off


def run_checks(config: RunConfig | None) -> Iterator[Diagnosis]:
    """Run all checks in the order of their dependencies."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    checks: list[tuple[str, Callable[[], str]]] = [
        ("packages", machine.packages),
        ("accelerator", lambda: machine.accelerator(config)),
        ("NCCL", lambda: machine.collective("NCCL", count)),
        ("gloo", lambda: machine.collective("gloo")),
        ("DeepSpeed operators", machine.operators),
        ("shared memory", lambda: machine.shared_memory(machine.shared_memory_of(config, count))),
        ("temporary disk", lambda: machine.disk(Path(tempfile.gettempdir()))),  # mostly Ray's
    ]
    if config is not None:
        is_here, cache = is_local(config.output), config.data.cache.folder
        folder = local_path(config.output) if is_here else journal_folder(config.folder)
        checks.append(("output disk" if is_here else "journal disk", partial(machine.disk, folder)))
        if cache is not None:
            checks.append(("cache disk", partial(machine.disk, local_path(cache))))
    checks += [
        ("open files", machine.open_files),
        ("locked memory", machine.locked_memory),
        ("rendezvous", machine.rendezvous),
        ("Ray", lambda: ray_cluster(config)),
        ("Ray token", lambda: ray_token(config)),
    ]
    yield from (diagnose(name, check) for name, check in checks)
    if config is None:
        yield Diagnosis("storage", "skipped", "give --config to check a run's output and sources")
    else:
        storage = Storage(config.storage).within(RETRY_SECONDS)
        yield diagnose("output", lambda: output(config, storage))
        users: dict[str, list[str]] = defaultdict(list)
        for name, source_config in config.sources.items():
            users[source_config.shards].append(name)
        for url, names in users.items():
            yield diagnose(f"source {', '.join(names)}", partial(source, config, storage, url))
    yield diagnose("MLflow", lambda: mlflow(config))
    yield diagnose("clock", lambda: clock(config))


def as_text(results: list[Diagnosis]) -> str:
    """Format one line per check, followed by the remedy of a failed one."""
    width = max(len(result.name) for result in results)
    lines = []
    for result in results:
        lines.append(f"{result.status:<9}  {result.name:<{width}}  {result.detail}")
        if result.remedy:
            lines.append(f"{'':<9}  {'':<{width}}  → {result.remedy}")
    return "\n".join(lines)


def output(config: RunConfig, storage: Storage) -> str:
    """Write, read, list and delete a small object in the run's output folder."""
    started = time.monotonic()
    try:
        check_storage(storage, config.output, f"mome-doctor-{secrets.token_hex(4)}", num_bytes=1024)
    except (StorageError, ConfigError) as error:
        raise Failed(f"{config.output}: {error}", "check the config's `storage` section") from error
    except OSError as error:
        raise Failed(f"{config.output}: {error}", "set `output` to a writable folder") from error
    return f"{config.output}: written, listed, read and deleted in {time.monotonic() - started:.2f} s"


def source(config: RunConfig, storage: Storage, url: str) -> str:
    """Check a folder's manifest and the first bytes of its first shard; a generated folder may be missing."""
    generated = f"{url}: generated when the run starts"
    is_generated = any(s.shards == url and s.synthetic is not None for s in config.sources.values())
    try:
        folder = shard_folder(url)
        try:
            manifest = load_manifest(storage, url)
            shards = [shard.name for shard in manifest.shards]
            detail = f"{url}: {manifest.num_samples} samples in {len(shards)} shards"
        except DataError:
            shards = shard_names(url, storage.list_info(folder))
            if not shards:
                raise
            detail = f"{url}: {len(shards)} tars, not indexed yet: the run will index them"
        if not shards and is_generated:
            return generated
        if shards and not storage.read_range(join(folder, shards[0]), 0, 512):
            raise Failed(f"{url}: {shards[0]} is empty", "run `mome shards check`")
    except (StorageError, ConfigError, DataError) as error:
        if is_generated:
            return generated
        remedy = "correct sources.….shards, or use `mome shards build` and `mome shards check`"
        raise Failed(str(error), remedy) from error
    return detail


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
    if server and server.split(".")[0] != client.split(".")[0]:
        remedy = f"run a server of version {client.split('.')[0]}, or install client {server}"
        raise Failed(f"{redact(uri)} has version {server}, the client has {client}", remedy)
    return f"{redact(uri)} answers, version {server or 'unknown'}, client {client}"


def clock(config: RunConfig | None) -> str:
    """Compare this machine's clock with that of the store or of MLflow: the first HTTP server that states a date."""
    store = (config.storage.endpoint_url if config else None) or os.environ.get("AWS_ENDPOINT_URL")
    for url in (store, configured_uri(config) if config else None):
        if not url or not url.startswith(("http://", "https://")):
            continue
        try:
            with urllib.request.urlopen(redact(url), timeout=ANSWER_SECONDS) as answer:
                date = answer.headers["Date"]
        except urllib.error.HTTPError as error:  # an error response has a date, too
            date = error.headers["Date"]
        except HTTP_ERRORS:
            continue
        try:
            skew = time.time() - parsedate_to_datetime(date).timestamp()
        except (TypeError, ValueError):  # missing or malformed
            continue
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
        found = json.loads(run_probes(["cluster", cluster.model_dump_json()], CLUSTER_SECONDS))
    except RuntimeError as error:
        raise Failed(f"{address}: {error}", "run ray start --head there, with this Ray version and token") from error
    offered = found["resources"]
    has = ", ".join(f"{offered.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    detail = f"{address}: {found['nodes']} node(s) with {has}, version {found['ray']}"
    needed = requested_resources(cluster, cluster.workers) if config else {}
    missing = [f"{number:g} {kind}" for kind, number in needed.items() if number > offered.get(kind, 0)]
    if missing:
        detail += f"; the run needs {', '.join(missing)} and waits until nodes (of an autoscaler) join"
    return detail


def ray_token(config: RunConfig | None) -> str:
    """Check that a Ray token exists if the cluster is on another machine, and that only its owner can read it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "in RAY_AUTH_TOKEN; a file is visible to fewer processes"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else token_file()
    address, _ = address_of(config.cluster if config else ClusterConfig()) or (None, "")
    if path is None or not path.is_file():
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
    group = mode & stat.S_IRGRP and all(folder & (stat.S_IXGRP | stat.S_IXOTH) for folder in entered)
    if everybody or group:
        raise Failed(f"{path} is readable by other users ({mode:o})", f"chmod 600 {path}")
    return f"{path}, readable only by its owner"
