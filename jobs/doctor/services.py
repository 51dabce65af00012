"""What a run speaks to: the object store, its sources, MLflow, a Ray cluster; and whether the clock is theirs."""

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

from jobs.cluster import address_of
from jobs.dashboard import TOKEN_FILE, is_loopback, token_file
from jobs.doctor.compute import finish_child, start_child
from jobs.doctor.finding import Finding, fails, not_asked, works
from jobs.resources import requested
from pipeline.config.errors import ConfigError, DataError, StorageError, TrackingError
from pipeline.config.redaction import redact
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.data.shards.manifest import load_manifest, shard_folder, shard_names
from pipeline.data.storage import Storage, join
from pipeline.tracking.locations import configured_uri, tracking_uri
from pipeline.tracking.mlflow_server import HTTP_ERRORS, check_server, http_get

PATIENCE_SECONDS = 20.0  # with a store; a run has storage.retry_timeout_seconds
ANSWER_SECONDS = 5.0
CLUSTER_SECONDS = 90.0
SKEW_SECONDS = 60.0  # S3 refuses requests that are 15 minutes off


def patient(config: RunConfig) -> Storage:
    """The run's store, which gives up sooner than a run does."""
    deadline = min(PATIENCE_SECONDS, config.storage.retry_timeout_seconds)
    return Storage(config.storage.model_copy(update={"retry_timeout_seconds": deadline}))


def output(config: RunConfig, storage: Storage) -> Finding:
    """Writes, lists, reads and deletes a small object where the run will write."""
    name, key = "output", f"mome-doctor-{secrets.token_hex(4)}"
    url, data = join(config.output, key), secrets.token_bytes(1024)
    began = time.monotonic()
    try:
        storage.write(url, data)
        same, listed = storage.read(url) == data, key in storage.list(config.output)
        storage.delete(url)
        gone = not storage.exists(url)
    except (StorageError, ConfigError) as error:
        return fails(name, f"{config.output}: {error}", "`storage` in the config says how it is reached")
    except OSError as error:
        return fails(name, f"{config.output}: {error}", "give an `output` that can be written")
    if not (same and listed and gone):
        told = "read something else" if not same else "does not list" if not listed else "still has"
        return fails(name, f"{config.output}: the store {told} what was written", "it is not consistent: use another")
    return works(name, f"{config.output}: written, listed, read and deleted in {time.monotonic() - began:.2f} s")


def sources(config: RunConfig, storage: Storage) -> list[Finding]:
    """For each folder of shards: its manifest, and the first bytes of its first shard."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, source in config.sources.items():
        names[source.shards].append(name)
    drawn = {source.shards for source in config.sources.values() if source.synthetic is not None}
    return [_source(f"source {', '.join(found)}", url, storage, url in drawn) for url, found in names.items()]


def _source(name: str, url: str, storage: Storage, drawn: bool) -> Finding:
    try:
        told, shards = _shards(url, storage)
        if not shards and drawn:
            return works(name, f"{url}: drawn when the run starts")
        if shards and not storage.read_range(join(shard_folder(url), shards[0]), 0, 512):
            return fails(name, f"{url}: {shards[0]} is empty", "mome shards check says more")
    except (StorageError, ConfigError, DataError) as error:
        if drawn:
            return works(name, f"{url}: drawn when the run starts")
        return fails(name, str(error), "correct sources.….shards, or see mome shards build and mome shards check")
    return works(name, f"{url}: {told}")


def _shards(url: str, storage: Storage) -> tuple[str, list[str]]:
    """What a source holds, and its shards' names. Raises what the manifest's loading raises when it holds none."""
    try:
        manifest = load_manifest(storage, url)
    except DataError:
        found = shard_names(url, storage.list_info(shard_folder(url)))
        if not found:
            raise
        return f"{len(found)} tars, not indexed yet: the run will do that", found
    return f"{manifest.num_samples} samples in {len(manifest.shards)} shards", [s.name for s in manifest.shards]


def mlflow(config: RunConfig | None) -> Finding:
    """Whether the tracking server answers, and is of the version whose client is here."""
    if config is None:
        return not_asked("MLflow", f"{importlib.metadata.version('mlflow')} is installed; --config says which server")
    try:
        uri = tracking_uri(config)
        check_server(config.model_copy(update={"tracking": config.tracking.model_copy(update={"required": True})}))
    except (TrackingError, ConfigError) as error:
        return fails("MLflow", str(error), "start it, or correct tracking.uri")
    client = importlib.metadata.version("mlflow")
    if not uri.startswith(("http://", "https://")):
        return works("MLflow", f"{redact(uri)} can be written, client {client}")
    server = _version_of(uri)
    if server and server.split(".")[0] != client.split(".")[0]:
        mend = f"run a server of version {client.split('.')[0]}, or install the client of {server}"
        return fails("MLflow", f"{redact(uri)} is of version {server}, the client of {client}", mend)
    return works("MLflow", f"{redact(uri)} answers, version {server or 'unknown'}, client {client}")


def _version_of(uri: str) -> str:
    try:
        status, body = http_get(redact(uri).rstrip("/") + "/version", limit=100)
    except HTTP_ERRORS:
        return ""
    version = body.decode(errors="replace").strip()  # none behind a login, or a proxy that does not pass it on
    return version if status == 200 and re.fullmatch(r"[0-9]+[0-9a-z.+]*", version) else ""


def clock(urls: Iterable[str]) -> Finding:
    """Whether this machine's time is that of the first of `urls` that says what time it is."""
    for url in urls:
        there = _time_at(url)
        if there is not None:
            skew = time.time() - there
            told = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {redact(url)}"
            if abs(skew) > SKEW_SECONDS:
                return fails("clock", told, "run NTP (chrony, systemd-timesyncd): S3 refuses 15 minutes")
            return works("clock", told)
    return not_asked("clock", "no server to compare it with")


def _time_at(url: str) -> float | None:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # it refuses, and says when
        date = error.headers["Date"]
    except HTTP_ERRORS:
        return None
    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):  # no date, or none that is one
        return None


def servers(config: RunConfig) -> list[str]:
    """The HTTP servers that a run speaks to."""
    store = config.storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    uris = [uri for uri in (store, configured_uri(config)) if uri]
    return [redact(uri) for uri in uris if uri.startswith(("http://", "https://"))]


def ray_cluster(config: RunConfig | None) -> Finding:
    """Whether the cluster that is named answers, and what it offers beside what the run asks for."""
    name = "Ray"
    address = _address(config)
    try:
        installed = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        if address:
            return fails(name, f"{address} is named, and Ray is not installed", "pip install 'mome[ray]'")
        return not_asked(name, "not installed; torchrun needs none")
    if not address:
        return not_asked(name, f"{installed}; no cluster is named, so a run starts its own")
    wanted = config.cluster if config else ClusterConfig()
    told, status = finish_child(start_child("cluster", wanted.model_dump_json()), CLUSTER_SECONDS)
    if status:
        return fails(name, f"{address}: {told}", "ray start --head there; the same Ray version and token here")
    offered = json.loads(told)
    has = ", ".join(f"{offered['resources'].get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    found = f"{address}: {offered['nodes']} node(s) with {has}, version {offered['ray']}"
    lacking = missing(wanted, offered["resources"]) if config else []
    if lacking:
        found += f"; the run asks for {', '.join(lacking)}: it waits until nodes join, as those of an autoscaler do"
    return works(name, found)


def _address(config: RunConfig | None) -> str | None:
    """Return the address of the cluster that is named, wherever it is."""
    found = address_of(config.cluster if config else ClusterConfig())
    return found[0] if found else None


def missing(wanted: ClusterConfig, offered: dict[str, float]) -> list[str]:
    """What all ranks and their loader actors ask for together, of each resource that the cluster has less of."""
    asked = requested(wanted, wanted.workers)
    return [f"{number:g} {kind}" for kind, number in asked.items() if number > offered.get(kind, 0)]


def ray_token(config: RunConfig | None) -> Finding:
    """Whether there is a token, only its owner can read it, and a cluster elsewhere is never entered without one."""
    name = "Ray token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return works(name, "in RAY_AUTH_TOKEN; a file shows it to fewer")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else token_file()
    address = _address(config)
    if path is None or not path.is_file():
        if named:
            return fails(name, f"RAY_AUTH_TOKEN_PATH names {path}, which is no file", "correct it, or unset it")
        if address and address != "auto" and not is_loopback(address):
            mend = f"copy the cluster's token to {TOKEN_FILE}, then chmod 600 {TOKEN_FILE}"
            return fails(name, f"none, and the cluster {address} is not on this machine", mend)
        return not_asked(name, "none; a cluster on this machine needs none of yours")
    if not path.read_text(encoding="utf-8").strip():
        return fails(name, f"{path} is empty", "ray get-auth-token --generate, or copy the cluster's")
    if _others_may_read(path):
        mode = stat.S_IMODE(path.stat().st_mode)
        return fails(name, f"{path} may be read by others ({mode:o})", f"chmod 600 {path}")
    return works(name, f"{path}, for its owner alone")


def _others_may_read(path: Path) -> bool:
    """Whether its group or everybody may, and may enter the folders it lies in. Ray writes it as any other file."""
    mode = path.stat().st_mode
    entered = [parent.stat().st_mode for parent in path.resolve().parents]
    everybody = mode & stat.S_IROTH and all(parent & stat.S_IXOTH for parent in entered)
    group = mode & stat.S_IRGRP and all(parent & (stat.S_IXGRP | stat.S_IXOTH) for parent in entered)
    return bool(everybody or group)
