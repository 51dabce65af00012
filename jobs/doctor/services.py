"""Checks of the services that a run uses: object store, sources, MLflow, Ray cluster; and of the clock."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import secrets
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from pathlib import Path

from jobs.cluster import address_of, requested_resources
from jobs.dashboard import TOKEN_FILE, is_loopback, token_file
from jobs.doctor.machine import Diagnosis, failed, finish_probe, passed, skipped, start_probe
from pipeline.config.errors import ConfigError, DataError, StorageError, TrackingError
from pipeline.config.redaction import redact
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.data.shards.manifest import load_manifest, shard_folder, shard_names
from pipeline.data.storage import Storage, join
from pipeline.tracking.locations import configured_uri, tracking_uri
from pipeline.tracking.mlflow_server import HTTP_ERRORS, check_server, http_get
from pipeline.training.preflight import check_storage

RETRY_SECONDS = 20.0  # for the store; a run retries for storage.retry_timeout_seconds
ANSWER_SECONDS = 5.0
CLUSTER_SECONDS = 90.0
SKEW_SECONDS = 60.0  # S3 refuses requests that are 15 minutes off


def impatient_storage(config: RunConfig) -> Storage:
    """Return the run's storage with a shorter retry timeout."""
    deadline = min(RETRY_SECONDS, config.storage.retry_timeout_seconds)
    return Storage(config.storage.model_copy(update={"retry_timeout_seconds": deadline}))


def output(config: RunConfig, storage: Storage) -> Diagnosis:
    """Write, read, list and delete a small object in the run's output folder."""
    started = time.monotonic()
    try:
        check_storage(storage, config.output, f"mome-doctor-{secrets.token_hex(4)}", num_bytes=1024)
    except (StorageError, ConfigError) as error:
        return failed("output", f"{config.output}: {error}", "check the config's `storage` section")
    except OSError as error:
        return failed("output", f"{config.output}: {error}", "set `output` to a writable folder")
    seconds = time.monotonic() - started
    return passed("output", f"{config.output}: written, listed, read and deleted in {seconds:.2f} s")


def sources(config: RunConfig, storage: Storage) -> list[Diagnosis]:
    """Check, for each folder of shards, its manifest and the first bytes of its first shard."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, source in config.sources.items():
        names[source.shards].append(name)
    generated = {source.shards for source in config.sources.values() if source.synthetic is not None}
    return [_source(f"source {', '.join(users)}", url, storage, url in generated) for url, users in names.items()]


def _source(name: str, url: str, storage: Storage, is_generated: bool) -> Diagnosis:
    try:
        description, shards = _shards(url, storage)
        if not shards and is_generated:
            return passed(name, f"{url}: generated when the run starts")
        if shards and not storage.read_range(join(shard_folder(url), shards[0]), 0, 512):
            return failed(name, f"{url}: {shards[0]} is empty", "run `mome shards check`")
    except (StorageError, ConfigError, DataError) as error:
        if is_generated:
            return passed(name, f"{url}: generated when the run starts")
        return failed(name, str(error), "correct sources.….shards, or use `mome shards build` and `mome shards check`")
    return passed(name, f"{url}: {description}")


def _shards(url: str, storage: Storage) -> tuple[str, list[str]]:
    """Return a source's description and the names of its shards. Raises DataError if it has none."""
    try:
        manifest = load_manifest(storage, url)
    except DataError:
        names = shard_names(url, storage.list_info(shard_folder(url)))
        if not names:
            raise
        return f"{len(names)} tars, not indexed yet: the run will index them", names
    return f"{manifest.num_samples} samples in {len(manifest.shards)} shards", [s.name for s in manifest.shards]


def mlflow(config: RunConfig | None) -> Diagnosis:
    """Check that the tracking server responds and that its version matches the installed client."""
    if config is None:
        return skipped(
            "MLflow", f"{importlib.metadata.version('mlflow')} is installed; give --config to check a run's server"
        )
    try:
        uri = tracking_uri(config)
        check_server(config, required=True)
    except (TrackingError, ConfigError) as error:
        return failed("MLflow", str(error), "start the server, or correct tracking.uri")
    client = importlib.metadata.version("mlflow")
    if not uri.startswith(("http://", "https://")):
        return passed("MLflow", f"{redact(uri)} is writable, client {client}")
    server = _version_of(uri)
    if server and server.split(".")[0] != client.split(".")[0]:
        remedy = f"run a server of version {client.split('.')[0]}, or install client {server}"
        return failed("MLflow", f"{redact(uri)} has version {server}, the client has {client}", remedy)
    return passed("MLflow", f"{redact(uri)} answers, version {server or 'unknown'}, client {client}")


def _version_of(uri: str) -> str:
    try:
        status, body = http_get(redact(uri).rstrip("/") + "/version", limit=100)
    except HTTP_ERRORS:
        return ""
    version = body.decode(errors="replace").strip()  # empty behind a login or some proxies
    return version if status == 200 and re.fullmatch(r"[0-9]+[0-9a-z.+]*", version) else ""


def clock(urls: Iterable[str]) -> Diagnosis:
    """Compare this machine's clock with the first of `urls` whose response has a date."""
    for url in urls:
        server_time = _time_at(url)
        if server_time is not None:
            skew = time.time() - server_time
            detail = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {redact(url)}"
            if abs(skew) > SKEW_SECONDS:
                return failed("clock", detail, "run NTP (chrony, systemd-timesyncd): S3 tolerates 15 minutes")
            return passed("clock", detail)
    return skipped("clock", "no server to compare with")


def _time_at(url: str) -> float | None:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # an error response has a date, too
        date = error.headers["Date"]
    except HTTP_ERRORS:
        return None
    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):  # missing or malformed
        return None


def servers(config: RunConfig) -> list[str]:
    """Return the URLs of the HTTP servers that a run uses."""
    store = config.storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    uris = [uri for uri in (store, configured_uri(config)) if uri]
    return [redact(uri) for uri in uris if uri.startswith(("http://", "https://"))]


def ray_cluster(config: RunConfig | None) -> Diagnosis:
    """Check that the configured cluster responds, and compare its resources with the run's request."""
    name = "Ray"
    address = _address(config)
    try:
        installed = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        if address:
            return failed(name, f"{address} is configured, but Ray is not installed", "pip install 'mome[ray]'")
        return skipped(name, "not installed; torchrun does not need it")
    if not address:
        return skipped(name, f"{installed}; no cluster is configured, so a run starts its own")
    cluster = config.cluster if config else ClusterConfig()
    output, status = finish_probe(start_probe("cluster", cluster.model_dump_json()), CLUSTER_SECONDS)
    if status:
        return failed(name, f"{address}: {output}", "run ray start --head there, with this Ray version and token")
    offered = json.loads(output)
    has = ", ".join(f"{offered['resources'].get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    detail = f"{address}: {offered['nodes']} node(s) with {has}, version {offered['ray']}"
    missing = missing_resources(cluster, offered["resources"]) if config else []
    if missing:
        detail += f"; the run needs {', '.join(missing)} and waits until nodes (of an autoscaler) join"
    return passed(name, detail)


def _address(config: RunConfig | None) -> str | None:
    """Return the address of the configured cluster; None if none is configured."""
    address = address_of(config.cluster if config else ClusterConfig())
    return address[0] if address else None


def missing_resources(cluster: ClusterConfig, offered: dict[str, float]) -> list[str]:
    """Return the request of all ranks and loader actors for each resource of which the cluster has less."""
    needed = requested_resources(cluster, cluster.workers)
    return [f"{number:g} {kind}" for kind, number in needed.items() if number > offered.get(kind, 0)]


def ray_token(config: RunConfig | None) -> Diagnosis:
    """Check that a Ray token exists if the cluster is on another machine, and that only its owner can read it."""
    name = "Ray token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return passed(name, "in RAY_AUTH_TOKEN; a file is visible to fewer processes")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else token_file()
    address = _address(config)
    if path is None or not path.is_file():
        if named:
            return failed(name, f"RAY_AUTH_TOKEN_PATH names {path}, which is not a file", "correct or unset it")
        if address and address != "auto" and not is_loopback(address):
            remedy = f"copy the cluster's token to {TOKEN_FILE}, then chmod 600 {TOKEN_FILE}"
            return failed(name, f"none, and the cluster {address} is not on this machine", remedy)
        return skipped(name, "none; a cluster on this machine does not need one")
    if not path.read_text(encoding="utf-8").strip():
        return failed(name, f"{path} is empty", "ray get-auth-token --generate, or copy the cluster's")
    if _others_may_read(path):
        mode = stat.S_IMODE(path.stat().st_mode)
        return failed(name, f"{path} is readable by other users ({mode:o})", f"chmod 600 {path}")
    return passed(name, f"{path}, readable only by its owner")


def _others_may_read(path: Path) -> bool:
    """Return True if the group or all users can read the file and enter its parent folders."""
    mode = path.stat().st_mode
    entered = [parent.stat().st_mode for parent in path.resolve().parents]
    everybody = mode & stat.S_IROTH and all(parent & stat.S_IXOTH for parent in entered)
    group = mode & stat.S_IRGRP and all(parent & (stat.S_IXGRP | stat.S_IXOTH) for parent in entered)
    return bool(everybody or group)
