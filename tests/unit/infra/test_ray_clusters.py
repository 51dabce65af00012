"""Ray's launcher accepts the cluster files, and they start a secured Ray."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.support.rendered_infra import INFRA, rendered

FILES = sorted(INFRA.glob("ray/*.yaml"))
named = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def cluster(path: Path, **changes: str) -> dict[str, Any]:
    (config,) = rendered(path, **changes)
    return config


@named
def test_rays_launcher_accepts_the_file(path: Path) -> None:
    """Run the steps of `ray up` before it contacts a cloud; Ray 2.60 has no dry run."""
    validate_config(prepare_config(cluster(path)))


def test_the_launcher_finds_misspelled_keys() -> None:
    config = prepare_config(cluster(FILES[0])) | {"dockers": {}}
    with pytest.raises(jsonschema.ValidationError, match="dockers"):
        validate_config(config)


@named
def test_ray_is_secured_and_workers_reach_the_head(path: Path) -> None:
    config = cluster(path)
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/mome/.ray/auth_token"] == "~/.ray/auth_token"
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--dashboard-port=8265" in head
    port = re.search(r"--port=(\d+)", head)[1]
    assert f"--address=$RAY_HEAD_IP:{port}" in worker


@named
def test_no_command_replaces_the_images_ray(path: Path) -> None:
    config = prepare_config(cluster(path))
    assert config["setup_commands"] == config["head_setup_commands"] == config["worker_setup_commands"] == []


@named
def test_commands_are_valid_bash(path: Path) -> None:
    config = cluster(path)
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_accelerator_and_loader_groups_have_bounds(name: str) -> None:
    types = cluster(INFRA / "ray" / f"{name}.yaml", GPU_NODES="12", LOADER_NODES="34")["available_node_types"]
    assert types["gpu"]["max_workers"] == 12
    assert types["gpu"]["resources"]["GPU"] == 8
    assert types["loader"]["max_workers"] == 34
    assert types["loader"]["resources"]["loader"] == 1
    assert types["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, None), (False, {"loader": 1})])
def test_on_premise_cpu_machines_offer_the_loader_resource(
    has_gpu: bool, expected: dict[str, int] | None, tmp_path: Path
) -> None:
    for name, script in {"nvidia-smi": f"exit {0 if has_gpu else 1}", "ray": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    command = cluster(INFRA / "ray" / "on_premise.yaml")["worker_start_ray_commands"][-1]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.10"}
    # The hard limit of the test process may be lower than the container's.
    command = command.replace("ulimit -n 65536", "true")
    output = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True, env=environment).stdout
    resources = [line.removeprefix("--resources=") for line in output.splitlines() if line.startswith("--resources=")]
    assert [json.loads(each) for each in resources] == ([] if expected is None else [expected])


def test_on_premise_machines_come_from_the_settings() -> None:
    config = cluster(INFRA / "ray" / "on_premise.yaml", WORKER_IPS="10.1.1.1, 10.1.1.2, 10.1.1.3")
    assert config["provider"]["worker_ips"] == ["10.1.1.1", "10.1.1.2", "10.1.1.3"]
