"""The compose file needs every value, contains no secret, exposes no port and refers to existing files.

The Dockerfile copies existing files, runs unprivileged and installs the tested versions.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.rendered_infra import INFRA, ROOT, load_script, pins, render

COMPOSE = INFRA / "compose.yaml"
ENV = INFRA / "compose.example.env"
SECRETS = {"POSTGRES_PASSWORD", "STORE_ACCESS_KEY", "STORE_SECRET_KEY", "RAY_AUTH_TOKEN"}
INTERPOLATED = re.compile(r"\$\{(\w+):\?[^}]*\}")
VALUES = render.read_settings(ENV.read_text(), str(ENV))
CONFIG: dict[str, Any] = yaml.safe_load(
    INTERPOLATED.sub(lambda match: VALUES[match[1]] or f"the-{match[1]}", COMPOSE.read_text())
)
SERVICES: dict[str, dict[str, Any]] = CONFIG["services"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# ---- compose


def test_every_value_is_required_and_the_example_holds_no_secret() -> None:
    text = COMPOSE.read_text()
    assert len(re.findall(r"\$\{", text)) == len(INTERPOLATED.findall(text)), "a ${…} without :? may be empty"
    assert set(INTERPOLATED.findall(text)) == set(VALUES)
    assert {name for name, value in VALUES.items() if not value} == SECRETS
    if (ROOT / ".git").exists():
        for name, is_ignored in (("infra/compose.env", True), ("infra/compose.example.env", False)):
            check = ["git", "check-ignore", "--quiet", name]
            assert (subprocess.run(check, cwd=ROOT, check=False).returncode == 0) == is_ignored


def test_services_have_no_unneeded_privileges_no_secret_arguments_and_ports_of_this_machine_only() -> None:
    for service in SERVICES.values():
        assert (service["security_opt"], service["cap_drop"]) == (["no-new-privileges:true"], ["ALL"])
        visible = yaml.safe_dump([service.get("command", []), service.get("healthcheck", {})])  # to all users
        assert [secret for secret in SECRETS if secret in visible] == []
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {name: [f"127.0.0.1:{n}:{n}"] for name, n in {"store": 7070, "mlflow": 5000, "head": 8265}.items()}
    addressed = dict(re.findall(r"\b(database|store|mlflow):(\d{4})\b", COMPOSE.read_text()))
    assert addressed == {"database": "5432", "store": "7070", "mlflow": "5000"}
    assert SERVICES["store"]["environment"]["VGW_PORT"] == ":7070"
    assert SERVICES["mlflow"]["command"][SERVICES["mlflow"]["command"].index("--port") + 1] == "5000"
    assert "--dashboard-port=8265" in SERVICES["head"]["command"]
    environment = SERVICES["head"]["environment"]
    assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", "the-RAY_AUTH_TOKEN")


def test_dependencies_volumes_images_and_the_gpu_file_exist() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES, f"{name} waits for {other}"
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
            is_once = how["condition"] == "service_completed_successfully"
            assert not is_once or SERVICES[other]["restart"] == "on-failure", f"{other} would be restarted forever"
        for source in (volume.split(":")[0] for volume in service.get("volumes", [])):
            assert (INFRA / source).is_file() if source.startswith(".") else source in CONFIG["volumes"]
    for name in ("bucket", "mlflow", "head"):
        build = SERVICES[name]["build"]
        assert (INFRA / build["context"] / build["dockerfile"]).resolve() == INFRA / "Dockerfile"
    for name in ("database", "store"):
        assert re.search(r":v?\d+\.\d+[\w.-]*$", SERVICES[name]["image"]), SERVICES[name]["image"]
    assert set(yaml.safe_load((INFRA / "compose.gpu.yaml").read_text())["services"]) == {"head"}
    assert "deploy" not in SERVICES["head"]


def test_mlflow_knows_the_variables_and_arguments_of_its_service() -> None:
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


# ---- the image

# (INSTRUCTION, arguments) by build stage, with continued lines joined and without comments; "" before the first stage
STAGES: dict[str, list[tuple[str, str]]] = defaultdict(list)
_text, _stage = re.sub(r"(?m)^\s*#.*\n", "", (INFRA / "Dockerfile").read_text()), ""
for _line in filter(None, re.sub(r"\\\n\s*", " ", _text).splitlines()):
    _word, _, _rest = _line.partition(" ")
    _stage = _rest.split(" AS ")[1] if _word == "FROM" else _stage
    STAGES[_stage].append((_word, _rest.strip()))
RUN = STAGES["run"]


def test_the_image_has_the_required_python_no_build_stage_an_unprivileged_user_and_its_commands() -> None:
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert {word for stage in STAGES.values() for word, _ in stage} <= known
    assert list(STAGES) == ["", "build", "run"]
    assert ("COPY", "--from=build /opt/mome /opt/mome") in RUN
    ((word, base),) = STAGES[""]
    assert word == "ARG"
    version = re.fullmatch(r"PYTHON_IMAGE=python:(\d+\.\d+)\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert version
    assert PYPROJECT["tool"]["mypy"]["python_version"] == version[1]
    for stage in ("build", "run"):
        assert [rest.split()[0] for word, rest in STAGES[stage] if word == "FROM"] == ["${PYTHON_IMAGE}"]
    assert [rest for word, rest in RUN if word == "USER"] == ["1000:1000"]
    assert "CMD" in [word for word, _ in RUN[RUN.index(("USER", "1000:1000")) :]]
    assert "--uid 1000 --gid mome --create-home" in " ".join(rest for word, rest in RUN if word == "RUN")
    # Ray's launcher uses login shells, in which Debian resets PATH.
    (command,) = [rest for _, rest in RUN if "/etc/profile.d/mome.sh" in rest]
    (path,) = re.findall(r"export PATH=([^']+)'", command)
    assert any(word == "ENV" and f"PATH={path}" in rest for word, rest in RUN)
    (command,) = [rest for _, rest in RUN if rest.startswith("python -c")]
    ((module, name),) = re.findall(r"from (\S+) import (\w+)", command)
    assert f"def {name}()" in (ROOT / f"{module.replace('.', '/')}.py").read_text(), "code run during the build"


def test_only_copied_files_are_sent_to_the_builder() -> None:
    def is_ignored(path: Path) -> bool:
        """Apply Docker's rule: the last pattern that matches the path or a parent folder decides."""
        result = False
        for line in (ROOT / ".dockerignore").read_text().splitlines():
            if line and not line.startswith("#"):
                pattern = line.removeprefix("!")
                if any(fnmatch.fnmatch(str(part), pattern) for part in (path, *path.parents[:-1])):
                    result = not line.startswith("!")
        return result

    copies = [rest for stage in STAGES.values() for word, rest in stage if word == "COPY"]
    copied = [source for rest in copies if not rest.startswith("--from") for source in rest.split()[:-1]]
    assert {"pipeline", "jobs", "configs", "setup.py"} <= set(copied)
    assert [source for source in copied if not (ROOT / source).exists() or is_ignored(Path(source))] == []
    others = [".git", ".venv", "runs/demo", "infra/compose.env", "settings.env", "tests"]
    assert [path for path in others if not is_ignored(Path(path))] == []


def test_packages_have_hashes_and_tested_compatible_versions() -> None:
    locked: dict[str, int] = {}
    name = ""
    for line in (INFRA / "requirements.lock").read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^ ;]+)", line):
            name = f"{match[1].lower()}=={match[2]}"
            locked[name] = 0
        elif line and not line.startswith("#"):
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
            locked[name] += 1
    assert all(locked.values())
    assert ("RUN", "pip install --require-hashes --no-deps --requirement infra/requirements.lock") in STAGES["build"]
    ours = {re.split(r"[\[>=]", line)[0].lower() for line in PYPROJECT["project"]["dependencies"]} | {"ray"}
    assert {f"{name}=={version}".lower() for name, version in pins().items() if name.lower() in ours} <= set(locked)
    extra = [line for line in (INFRA / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in extra)
    assert set(extra) <= set(locked)
    # Released together, with requirements on each other's version.
    assert dict(line.split("==") for line in extra)["boto3"] == pins()["botocore"]
