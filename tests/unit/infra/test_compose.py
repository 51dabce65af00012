"""The compose file needs every value, contains no secret, exposes no port and refers to existing files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.rendered_infra import INFRA, ROOT, load_script, render

COMPOSE = INFRA / "compose.yaml"
ENV = INFRA / "compose.example.env"
SECRETS = {"POSTGRES_PASSWORD", "STORE_ACCESS_KEY", "STORE_SECRET_KEY", "RAY_AUTH_TOKEN"}
INTERPOLATED = re.compile(r"\$\{(\w+):\?[^}]*\}")


VALUES = render.read_settings(ENV.read_text(), str(ENV))
CONFIG: dict[str, Any] = yaml.safe_load(
    INTERPOLATED.sub(lambda match: VALUES[match[1]] or f"the-{match[1]}", COMPOSE.read_text())
)
SERVICES: dict[str, dict[str, Any]] = CONFIG["services"]


def texts(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for inner in node.values():
            yield from texts(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from texts(inner)
    else:
        yield str(node)


def test_every_value_is_required_and_the_example_holds_no_secret() -> None:
    text = COMPOSE.read_text()
    assert len(re.findall(r"\$\{", text)) == len(INTERPOLATED.findall(text)), "a ${…} without :? may be empty"
    assert set(INTERPOLATED.findall(text)) == set(VALUES)
    assert {name for name, value in VALUES.items() if not value} == SECRETS


def test_the_env_file_is_ignored_by_git() -> None:
    def ignored(name: str) -> bool:
        return subprocess.run(["git", "check-ignore", "--quiet", name], cwd=ROOT, check=False).returncode == 0

    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    assert ignored("infra/compose.env")
    assert not ignored("infra/compose.example.env")


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_no_unneeded_privileges_and_no_secret_arguments(name: str) -> None:
    """Arguments are visible to all users of the machine."""
    service = SERVICES[name]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["cap_drop"] == ["ALL"]
    for argument in texts([service.get("command", []), service.get("healthcheck", {})]):
        assert not any(secret in argument for secret in SECRETS), argument


def test_ports_are_bound_to_this_machine_only() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {
        "store": ["127.0.0.1:7070:7070"],
        "mlflow": ["127.0.0.1:5000:5000"],
        "head": ["127.0.0.1:8265:8265"],
    }


def test_services_are_addressed_at_ports_they_listen_on() -> None:
    text = " ".join(texts(SERVICES)) + COMPOSE.read_text()
    addressed = dict(re.findall(r"\b(database|store|mlflow):(\d{4})\b", text))
    assert addressed == {"database": "5432", "store": "7070", "mlflow": "5000"}
    assert SERVICES["store"]["environment"]["VGW_PORT"] == ":7070"
    assert SERVICES["mlflow"]["command"][SERVICES["mlflow"]["command"].index("--port") + 1] == "5000"
    assert "--dashboard-port=8265" in SERVICES["head"]["command"]


def test_dependencies_exist_and_have_a_health_check() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES, f"{name} waits for {other}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other]
            if how["condition"] == "service_completed_successfully":
                assert SERVICES[other]["restart"] == "on-failure", f"{other} would be restarted forever"


def test_volumes_are_declared_and_mounted_files_exist() -> None:
    for service in SERVICES.values():
        for source in (volume.split(":")[0] for volume in service.get("volumes", [])):
            assert (INFRA / source).is_file() if source.startswith(".") else source in CONFIG["volumes"]


def test_images_are_our_own_or_have_full_versions() -> None:
    for name in ("bucket", "mlflow", "head"):
        build = SERVICES[name]["build"]
        assert (INFRA / build["context"] / build["dockerfile"]).resolve() == INFRA / "Dockerfile"
    for name in ("database", "store"):
        assert re.search(r":v?\d+\.\d+[\w.-]*$", SERVICES[name]["image"]), SERVICES[name]["image"]


def test_ray_requires_a_token() -> None:
    environment = SERVICES["head"]["environment"]
    assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", "the-RAY_AUTH_TOKEN")


def test_mlflow_accepts_its_command_line() -> None:
    """MLflow's own command line parses the arguments."""
    from mlflow.cli import server
    from mlflow.utils.uri import extract_db_type_from_uri

    service = SERVICES["mlflow"]
    assert extract_db_type_from_uri(service["environment"]["MLFLOW_BACKEND_STORE_URI"]) == "postgresql"
    named = [option.envvar for option in server.params if option.envvar]
    variables = {name for names in named for name in ([names] if isinstance(names, str) else names)}
    assert {"MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"} <= variables
    options = {name for option in server.params for name in option.opts}
    assert {argument for argument in service["command"][2:] if argument.startswith("--")} <= options


def test_the_gpu_file_extends_an_existing_service() -> None:
    added = yaml.safe_load((INFRA / "compose.gpu.yaml").read_text())["services"]
    assert set(added) == {"head"}
    assert "deploy" not in SERVICES["head"]


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    env = tmp_path / "compose.env"
    env.write_text("".join(f"{line}x\n" if line.endswith("=") else f"{line}\n" for line in ENV.read_text().split("\n")))
    files = ["--file", str(COMPOSE), "--file", str(INFRA / "compose.gpu.yaml")]
    subprocess.run([docker, "compose", "--env-file", str(env), *files, "config", "--quiet"], check=True)


def test_creating_the_bucket_twice_succeeds(moto_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in moto_store.environment.items():
        monkeypatch.setenv(name, value)
    make_bucket = load_script(INFRA / "make_bucket.py").make_bucket
    for _ in range(2):
        make_bucket("mome-compose")
    names = [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]
    assert names.count("mome-compose") == 1
