"""Ray's cluster files for machines: Ray's own launcher takes them, and they start Ray closed to strangers."""

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
def test_rays_launcher_takes_the_file(path: Path) -> None:
    """What `ray up` does before it speaks to a cloud; 2.60 has no dry run."""
    validate_config(prepare_config(cluster(path)))


def test_the_launcher_would_find_a_misspelled_key() -> None:
    config = prepare_config(cluster(FILES[0])) | {"dockers": {}}
    with pytest.raises(jsonschema.ValidationError, match="dockers"):
        validate_config(config)


@named
def test_a_token_is_asked_for_and_goes_to_every_machine(path: Path) -> None:
    config = cluster(path)
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/mome/.ray/auth_token"] == "~/.ray/auth_token"


@named
def test_the_dashboard_answers_only_on_the_head_itself(path: Path) -> None:
    start = cluster(path)["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--dashboard-port=8265" in start


@named
def test_workers_go_where_the_head_listens(path: Path) -> None:
    config = cluster(path)
    port = re.search(r"--port=(\d+)", config["head_start_ray_commands"][-1])[1]
    assert f"--address=$RAY_HEAD_IP:{port}" in config["worker_start_ray_commands"][-1]


@named
def test_no_command_installs_another_ray_over_the_images(path: Path) -> None:
    config = prepare_config(cluster(path))
    commands = [*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"]]
    assert commands == []


@named
def test_commands_are_bash(path: Path) -> None:
    config = cluster(path)
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_accelerators_and_loaders_are_groups_with_their_bounds(name: str) -> None:
    types = cluster(INFRA / "ray" / f"{name}.yaml", GPU_NODES="12", LOADER_NODES="34")["available_node_types"]
    assert types["gpu"]["max_workers"] == 12
    assert types["gpu"]["resources"]["GPU"] == 8
    assert types["loader"]["max_workers"] == 34
    assert types["loader"]["resources"]["loader"] == 1
    assert types["head"]["resources"] == {"CPU": 0}


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, None), (False, {"loader": 1})])
def test_on_premise_a_machine_without_accelerators_offers_to_load(
    has_gpu: bool, expected: dict[str, int] | None, tmp_path: Path
) -> None:
    for name, script in {"nvidia-smi": f"exit {0 if has_gpu else 1}", "ray": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    command = cluster(INFRA / "ray" / "on_premise.yaml")["worker_start_ray_commands"][-1]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.10"}
    # The hard limit of whoever runs the tests may be lower than the container's.
    command = command.replace("ulimit -n 65536", "true")
    told = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True, env=environment).stdout
    resources = [line.removeprefix("--resources=") for line in told.splitlines() if line.startswith("--resources=")]
    assert [json.loads(each) for each in resources] == ([] if expected is None else [expected])


def test_on_premise_machines_are_those_of_the_settings() -> None:
    config = cluster(INFRA / "ray" / "on_premise.yaml", WORKER_IPS="10.1.1.1, 10.1.1.2, 10.1.1.3")
    assert config["provider"]["worker_ips"] == ["10.1.1.1", "10.1.1.2", "10.1.1.3"]
