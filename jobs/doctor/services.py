"""Checks of the services that a run uses: object store, sources, MLflow, Ray cluster; and of the clock."""

from __future__ import annotations

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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
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


def sources(config: RunConfig, storage: Storage) -> Iterator[Diagnosis]:
    """Check, for each folder of shards, its manifest and the first bytes of its first shard."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, source in config.sources.items():
        names[source.shards].append(name)
    generated = {source.shards for source in config.sources.values() if source.synthetic is not None}
    for url, users in names.items():
        name = f"source {', '.join(users)}"
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
            if not shards and url in generated:
                yield passed(name, f"{url}: generated when the run starts")
            elif shards and not storage.read_range(join(folder, shards[0]), 0, 512):
                yield failed(name, f"{url}: {shards[0]} is empty", "run `mome shards check`")
            else:
                yield passed(name, detail)
        except (StorageError, ConfigError, DataError) as error:
            if url in generated:
                yield passed(name, f"{url}: generated when the run starts")
            else:
                remedy = "correct sources.….shards, or use `mome shards build` and `mome shards check`"
                yield failed(name, str(error), remedy)


def mlflow(config: RunConfig | None) -> Diagnosis:
    """Check that the tracking server responds and that its version matches the installed client."""
    if config is None:
        return skipped("MLflow", f"{version('mlflow')} is installed; give --config to check a run's server")
    try:
        uri = tracking_uri(config)
        check_server(config, required=True)
    except (TrackingError, ConfigError) as error:
        return failed("MLflow", str(error), "start the server, or correct tracking.uri")
    client = version("mlflow")
    if not uri.startswith(("http://", "https://")):
        return passed("MLflow", f"{redact(uri)} is writable, client {client}")
    server = ""
    with suppress(*HTTP_ERRORS):
        status, body = http_get(redact(uri).rstrip("/") + "/version", limit=100)
        stated = body.decode(errors="replace").strip()  # empty behind a login or some proxies
        server = stated if status == 200 and re.fullmatch(r"[0-9]+[0-9a-z.+]*", stated) else ""
    if server and server.split(".")[0] != client.split(".")[0]:
        remedy = f"run a server of version {client.split('.')[0]}, or install client {server}"
        return failed("MLflow", f"{redact(uri)} has version {server}, the client has {client}", remedy)
    return passed("MLflow", f"{redact(uri)} answers, version {server or 'unknown'}, client {client}")


def clock(urls: Iterable[str]) -> Diagnosis:
    """Compare this machine's clock with the first of `urls` whose response has a date."""
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
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
            return failed("clock", detail, "run NTP (chrony, systemd-timesyncd): S3 tolerates 15 minutes")
        return passed("clock", detail)
    return skipped("clock", "no server to compare with")


def servers(config: RunConfig) -> list[str]:
    """Return the URLs of the HTTP servers that a run uses."""
    store = config.storage.endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    uris = [uri for uri in (store, configured_uri(config)) if uri]
    return [redact(uri) for uri in uris if uri.startswith(("http://", "https://"))]


def ray_cluster(config: RunConfig | None) -> Diagnosis:
    """Check that the configured cluster responds, and compare its resources with the run's request."""
    name, cluster = "Ray", config.cluster if config else ClusterConfig()
    address, _ = address_of(cluster) or (None, "")
    try:
        installed = version("ray")
    except PackageNotFoundError:
        if address:
            return failed(name, f"{address} is configured, but Ray is not installed", "pip install 'mome[ray]'")
        return skipped(name, "not installed; torchrun does not need it")
    if not address:
        return skipped(name, f"{installed}; no cluster is configured, so a run starts its own")
    output, status = finish_probe(start_probe("cluster", cluster.model_dump_json()), CLUSTER_SECONDS)
    if status:
        return failed(name, f"{address}: {output}", "run ray start --head there, with this Ray version and token")
    cluster_state = json.loads(output)
    offered = cluster_state["resources"]
    has = ", ".join(f"{offered.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    detail = f"{address}: {cluster_state['nodes']} node(s) with {has}, version {cluster_state['ray']}"
    needed = requested_resources(cluster, cluster.workers) if config else {}
    missing = [f"{number:g} {kind}" for kind, number in needed.items() if number > offered.get(kind, 0)]
    if missing:
        detail += f"; the run needs {', '.join(missing)} and waits until nodes (of an autoscaler) join"
    return passed(name, detail)


def ray_token(config: RunConfig | None) -> Diagnosis:
    """Check that a Ray token exists if the cluster is on another machine, and that only its owner can read it."""
    name = "Ray token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return passed(name, "in RAY_AUTH_TOKEN; a file is visible to fewer processes")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else token_file()
    address, _ = address_of(config.cluster if config else ClusterConfig()) or (None, "")
    if path is None or not path.is_file():
        if named:
            return failed(name, f"RAY_AUTH_TOKEN_PATH names {path}, which is not a file", "correct or unset it")
        if address and address != "auto" and not is_loopback(address):
            remedy = f"copy the cluster's token to {TOKEN_FILE}, then chmod 600 {TOKEN_FILE}"
            return failed(name, f"none, and the cluster {address} is not on this machine", remedy)
        return skipped(name, "none; a cluster on this machine does not need one")
    if not path.read_text(encoding="utf-8").strip():
        return failed(name, f"{path} is empty", "ray get-auth-token --generate, or copy the cluster's")
    # Can the group or all users read the file and enter its parent folders?
    mode, entered = stat.S_IMODE(path.stat().st_mode), [folder.stat().st_mode for folder in path.resolve().parents]
    everybody = mode & stat.S_IROTH and all(folder & stat.S_IXOTH for folder in entered)
    group = mode & stat.S_IRGRP and all(folder & (stat.S_IXGRP | stat.S_IXOTH) for folder in entered)
    if everybody or group:
        return failed(name, f"{path} is readable by other users ({mode:o})", f"chmod 600 {path}")
    return passed(name, f"{path}, readable only by its owner")
