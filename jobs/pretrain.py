"""A run on Ray: Ray Train places the ranks and restarts them; checkpoints, data order and tracking are ours.

A rank that meets an error which a restart would only repeat (a config, data or checkpoint fault, NaN, out of memory)
leaves it in the run's folder; after the restart every rank sees it and returns, and the driver raises it. Ray Train
itself retries every exception, whatever its kind.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pipeline.config.errors import ConfigError, MomeError, RunFailed, StorageError
from pipeline.config.load import validate
from pipeline.config.paths import local_path, with_absolute_paths
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.data.loader import local_preparer
from pipeline.data.preparation import PreparerFactory
from pipeline.data.storage import Storage, join
from pipeline.tracking.tracker import check_server, tracking_uri
from pipeline.training.checkpoint import is_committed, stage_url
from pipeline.training.loop import Progress, train
from pipeline.training.prepare import prepare

log = logging.getLogger(__name__)

FAILURE_FILE, PROGRESS_FILE = "failure.json", "progress.json"
PROGRESS_SECONDS = 1.0
KNOCK_SECONDS = 5.0
SQLITE = "sqlite:///"

Show = Callable[[Progress], None]


def pretrain(config: RunConfig, show: Show) -> bool:
    """Run every stage that is not finished; False when there was nothing left to do.

    Raises MomeError with one message for whatever stopped the run for good.
    """
    config = for_ranks(config)
    storage = Storage(config.storage)
    check_server(config)
    prepare(config, storage)
    if _unfinished(config, storage) is None:
        return False
    storage.delete(join(config.folder, FAILURE_FILE))
    storage.delete(join(config.folder, PROGRESS_FILE))
    connect(config.cluster)
    watcher = _Watcher(config, storage, show)
    try:
        _fit(config)
    except Exception as error:
        _raise_failure(config, storage)
        raise RunFailed(
            f"the run stopped after {config.cluster.max_failures} restart(s): {_root_cause(error)}. "
            "Run the same command to go on from the last checkpoint; cluster.max_failures sets the budget."
        ) from error
    finally:
        watcher.stop()
    _raise_failure(config, storage)
    unfinished = _unfinished(config, storage)
    if unfinished is not None:
        raise RunFailed(
            f"the ranks ended without finishing stage {unfinished} in {config.folder}; if this machine and the "
            "cluster's nodes do not share that folder, give an `output` that all of them see"
        )
    return True


def for_ranks(config: RunConfig) -> RunConfig:
    """The config as every rank must read it, whatever its working folder: local paths and the MLflow file absolute."""
    values = with_absolute_paths(config).model_dump(mode="json", exclude_unset=True)
    uri = tracking_uri(config)
    if uri.startswith(SQLITE):
        uri = SQLITE + str(local_path(uri.removeprefix(SQLITE)))
    values["tracking"] = {**values.get("tracking", {}), "uri": uri}
    return validate(values, config.name)


def _unfinished(config: RunConfig, storage: Storage) -> str | None:
    """The first stage that has not handed over its weights."""
    names = [stage.name for stage in config.stages]
    return next((n for i, n in enumerate(names) if not is_committed(storage, stage_url(config, i))), None)


def connect(cluster: ClusterConfig) -> None:
    """Join the given cluster, or start a local one. Raises ConfigError without Ray, RunFailed when nobody answers."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed here: pip install 'mome[ray]', or train without it: "
            "torchrun --nproc-per-node N -m pipeline.training CONFIG"
        ) from error

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RaySystemError) as error:
            raise RunFailed(
                f"cluster.address {address}: no Ray cluster answers ({error}). Start one (ray start --head), "
                "correct the address, or leave it out to run on this machine."
            ) from error
        return
    each = cluster.cpus_per_worker + cluster.loader_actors * cluster.loader_cpus
    needed = int(cluster.workers * each) + 1
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, needed), include_dashboard=False, **quiet)


def _knock(address: str) -> None:
    """Find out in seconds that nobody listens at host:port; Ray itself would wait for minutes. Raises OSError."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()


def _fit(config: RunConfig) -> None:
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = TorchTrainer(
        run_rank,
        train_loop_config={"config": config.model_dump_json()},
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RayRunConfig(
            # Ray Train would resume a name it knows; where a run stands is for our checkpoints to say.
            name=f"{config.name}-{secrets.token_hex(4)}",
            storage_path=os.path.join(tempfile.gettempdir(), "mome-ray-train"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    trainer.fit()


def run_rank(loop_config: dict[str, str]) -> None:
    """What Ray Train runs on each worker."""
    config = RunConfig.model_validate_json(loop_config["config"])
    storage = Storage(config.storage)
    if storage.exists(join(config.folder, FAILURE_FILE)):
        return
    try:
        train(config, _ProgressFile(config, storage), _preparer(config))
    except Exception as error:
        told = _told(error)
        if told is not None:
            storage.write(join(config.folder, FAILURE_FILE), json.dumps(told).encode())
        raise


def _preparer(config: RunConfig) -> PreparerFactory:
    if not config.cluster.loader_actors:
        return local_preparer
    from jobs.loader_actors import ActorPreparer

    return ActorPreparer


def _told(error: Exception) -> dict[str, Any] | None:
    """The message of an error that a restart would only repeat; None for one that may be tried again."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        message = f"out of memory: {error}. Set engine.micro_batch lower, or engine.zero_stage higher."
        return {"message": message, "exit_status": 1}
    if isinstance(error, MomeError) and not isinstance(error, StorageError):
        return {"message": str(error), "exit_status": error.exit_status}
    return None


def _raise_failure(config: RunConfig, storage: Storage) -> None:
    url = join(config.folder, FAILURE_FILE)
    if storage.exists(url):
        failure = json.loads(storage.read(url))
        error = RunFailed(failure["message"])
        error.exit_status = failure["exit_status"]
        raise error


def _root_cause(error: BaseException) -> str:
    """The first line that says something of a chain of Ray's wrappers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _ProgressFile:
    """Rank 0's report: a small file in the run's folder, at most once a second."""

    def __init__(self, config: RunConfig, storage: Storage):
        self._url = join(config.folder, PROGRESS_FILE)
        self._storage = storage
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        last_of_stage = progress.stage_step == progress.stage_steps
        if last_of_stage or time.monotonic() - self._last >= PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._storage.write(self._url, json.dumps(asdict(progress)).encode())


class _Watcher:
    """Shows the progress file of a run on the driver, wherever its ranks are."""

    def __init__(self, config: RunConfig, storage: Storage, show: Show):
        self._url = join(config.folder, PROGRESS_FILE)
        self._storage, self._show = storage, show
        self._stop = threading.Event()
        self._seen: bytes = b""
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(PROGRESS_SECONDS):
            self._look()

    def _look(self) -> None:
        try:
            if not self._storage.exists(self._url):
                return
            data = self._storage.read(self._url)
        except StorageError as error:  # the picture may be late; the run goes on
            log.debug("progress not read: %s", error)
            return
        if data != self._seen:
            self._seen = data
            self._show(Progress(**json.loads(data)))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._look()
