"""The files of infra/: settings, KubeRay, Ray's launcher, compose, image and scripts are valid, complete and secured.

Rendering replaces every variable, each of which has a value and an explanation, or fails. The Slurm job retries
failures, stops at a limit, and is requeued: scripts that record their arguments replace Slurm's commands, and `srun`
runs the test's substitute for torchrun.
"""

import copy
import fnmatch
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from tests.support.stores import Store

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERAY, RAY = INFRA / "kuberay", sorted(INFRA.glob("ray/*.yaml"))
KINDS = {"raycluster": "rayclusters", "rayjob": "rayjobs"}
FILES = sorted([*KUBERAY.glob("*.yaml"), *RAY])
Start = Callable[..., subprocess.Popen[str]]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


render = SimpleNamespace(**runpy.run_path(str(INFRA / "render.py")))  # infra/ is not a package
EXAMPLE, COMPOSE_EXAMPLE = INFRA / "settings.example.env", INFRA / "compose.example.env"
SETTINGS, VALUES = (render.read_settings(path.read_text(), str(path)) for path in (EXAMPLE, COMPOSE_EXAMPLE))


def rendered(path: Path, **changes: str) -> list[dict[str, Any]]:
    """Return the documents of a rendered YAML file of infra/."""
    return list(yaml.safe_load_all(render.render(path, SETTINGS | changes)))


def test_the_example_explains_every_variable_and_missing_ones_are_named(tmp_path: Path, capsys: Any) -> None:
    """A comment, or another setting explained by the same comment, is directly above."""
    assert set(SETTINGS) == set().union(*(render.variables(path) for path in FILES))
    assert not [path for path in FILES if "${" in render.render(path, SETTINGS)]
    for above, line in itertools.pairwise(EXAMPLE.read_text().splitlines()):
        assert "=" not in line or line.startswith("#") or above.startswith("#") or "=" in above, line
    file, env = tmp_path / "file.yaml", tmp_path / "my.env"
    file.write_text("a: ${ONE}\nb: ${TWO}-${ONE}\nc: $RAY_HEAD_IP $(date)\n")
    unreadable = dict.fromkeys(("TWO=2\nexport ONE=1", "TWO=2\nONE", "TWO=2\none=1"), "my.env, line 2")
    for settings, error in {"ONE=1": "no value for TWO", "ONE=1\nTWO=": "no value for TWO", **unreadable}.items():
        env.write_text(settings)
        assert render.main([str(file), str(env)]) == 2
        output = capsys.readouterr()
        assert (output.out, error in output.err) == ("", True)
    env.write_text("# mine\n\nONE=1\nTWO=2")
    assert render.main([str(file), str(env), "ONE=3"]) == 0
    assert capsys.readouterr() == ("a: 3\nb: 2-3\nc: $RAY_HEAD_IP $(date)\n", "")


def test_manifests_are_valid_for_kuberay_and_wrong_keys_and_values_are_not(shared: Path) -> None:
    folder = shared / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip("../shared/schemas/kuberay is absent: it holds KubeRay's definitions")
    for name, kind in KINDS.items():
        versions = yaml.load((folder / f"ray.io_{kind}.yaml").read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
        schema: dict[str, Any] = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
        schema["properties"]["metadata"] = {"type": "object"}  # of Kubernetes itself, not described there
        pending = [schema]
        while pending:  # forbid unknown keys, because Kubernetes drops them silently
            place = pending.pop()
            if "properties" in place:
                place.setdefault("additionalProperties", False)
            inner = [*place.get("properties", {}).values(), place.get("items"), place.get("additionalProperties")]
            pending += [value for value in inner if isinstance(value, dict)]
        (valid,) = rendered(KUBERAY / f"{name}.yaml")
        validator = jsonschema.Draft202012Validator(schema)
        assert list(validator.iter_errors(valid)) == []
    for path, value in {  # of the job, the last one
        "backoffLimits": 3, "backoffLimit": "three", "rayClusterSpec.authOptions.mode": "password",
        "rayClusterSpec.networkPolicy.mode": "DenyEverybody",
        "rayClusterSpec.headGroupSpec.template.spec.restartpolicy": "Never",
    }.items():  # fmt: skip
        *parents, key = path.split(".")
        manifest = copy.deepcopy(valid)
        reduce(getitem, parents, manifest["spec"])[key] = value
        assert len(list(validator.iter_errors(manifest))) == 1, path


@pytest.mark.parametrize("manifest", KINDS)
def test_groups_are_parsed_and_access_privileges_and_resources_are_limited(manifest: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive

    spec = rendered(KUBERAY / f"{manifest}.yaml")[0]["spec"]
    spec = spec.get("rayClusterSpec", spec)
    read = derive({"metadata": {"name": "mome", "namespace": "mome"}, "spec": spec})
    types = {name: (kind["max_workers"], kind["resources"]) for name, kind in read["available_node_types"].items()}
    assert types["headgroup"] == (0, {"CPU": 0, "memory": 16 * 2**30})
    assert types["gpu"] == (4, {"CPU": 96, "GPU": 8, "memory": 800 * 2**30})
    workers, resources = types["loader"]
    # cluster.loader_resource requests a thousandth of the resource `loader`.
    assert (workers, resources["loader"], resources["CPU"], "GPU" in resources) == (4, 1, 30, False)
    assert read["idle_timeout_minutes"] == 10
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["networkPolicy"]["mode"] in ("DenyAll", "DenyAllIngress")
    for rule in spec["networkPolicy"]["head"]["ingressRules"]:
        assert rule["from"], "a rule without `from` lets everybody in"
        assert [port["port"] for port in rule["ports"]] == [8265]
    assert "serviceType" not in spec["headGroupSpec"]  # ClusterIP: reached by kubectl port-forward
    assert spec["rayVersion"] == PINS["ray"]
    (mount,) = spec["autoscalerOptions"]["volumeMounts"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    assert mount["name"] in {volume["name"] for volume in spec["headGroupSpec"]["template"]["spec"]["volumes"]}
    contexts = [spec["autoscalerOptions"]["securityContext"]]
    for pod in [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]:
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} - {mount["name"]}
        assert pod["automountServiceAccountToken"] is False
        sources = {volume["name"]: volume.get("projected", {}).get("sources", []) for volume in pod["volumes"]}
        tokens = {name for name, parts in sources.items() if any("serviceAccountToken" in part for part in parts)}
        assert tokens.isdisjoint(mounted)
        for container in pod["containers"]:
            contexts.append(container["securityContext"])
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["image"] == "registry.example.com/mome:0.1.0"
    for context in contexts:
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 1000)
        assert (context["allowPrivilegeEscalation"], context["capabilities"]) == (False, {"drop": ["ALL"]})


def test_secrets_are_references_and_a_permanent_cluster_survives_its_head() -> None:
    pending: list[Any] = [document for path in KUBERAY.glob("*.yaml") for document in rendered(path)]
    assert "Secret" not in {document.get("kind") for document in pending}
    secrets = []
    while pending:
        node = pending.pop()
        if isinstance(node, dict) and set(node) in ({"name", "value"}, {"name", "valueFrom"}):
            secrets += [node] if re.search("password|secret|token|access_key", node["name"].lower()) else []
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    assert len(secrets) > 5
    assert all(set(variable.get("valueFrom", ())) == {"secretKeyRef"} for variable in secrets)
    (cluster,) = rendered(KUBERAY / "raycluster.yaml")
    service, redis, policy = rendered(KUBERAY / "redis.yaml")
    (port,) = service["spec"]["ports"]
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"redis://{service['metadata']['name']}:{port['port']}"
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert options["redisPassword"]["valueFrom"] == container["env"][0]["valueFrom"]
    labels = redis["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == policy["spec"]["podSelector"]["matchLabels"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]


def test_a_job_is_retried_cleans_up_and_runs_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """KubeRay retries with the manifest's entry point; every rendering is a new launch."""
    from jobs import cli, train

    ((job,), (another,)) = (rendered(KUBERAY / "rayjob.yaml", JOB_RETRIES="7") for _ in range(2))
    assert (job["spec"]["backoffLimit"], job["spec"]["shutdownAfterJobFinishes"]) == (7, True)
    assert "gcsFaultToleranceOptions" not in job["spec"]["rayClusterSpec"]  # a new cluster would not read it
    claim = re.compile(r"env MOME_CLAIM=([0-9a-f]{16}) mome train ")
    assert claim.match(job["spec"]["entrypoint"])[1] != claim.match(another["spec"]["entrypoint"])[1]
    # `mome train` parses the arguments, with the demo's config instead of the mounted one.
    _, _, _, command, config, *rest = job["spec"]["entrypoint"].split()
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mount = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "run")
    assert config == f"{mount['mountPath']}/run.yaml"
    trained = []
    monkeypatch.setattr(train, "pretrain", lambda settings, *_: trained.append(settings))
    CliRunner().invoke(cli.app, [command, str(ROOT / "configs" / "demo.yaml"), f"output={tmp_path}", *rest])
    assert [settings.cluster.address for settings in trained] == ["auto"]


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.stem)
def test_rays_launcher_accepts_the_file_and_starts_a_secured_ray(path: Path) -> None:
    """Run the steps of `ray up` before it contacts a cloud; Ray 2.60 has no dry run."""
    (config,), prepared = rendered(path), prepare_config(rendered(path)[0])
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError, match="dockers"):
        validate_config(prepared | {"dockers": {}})
    # No command replaces the image's Ray.
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/mome/.ray/auth_token"] == "~/.ray/auth_token"
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    assert {"--dashboard-host=127.0.0.1", "--dashboard-port=8265"} <= set(head[-1].split())
    (port,) = re.findall(r"--port=(\d+)", head[-1])
    assert f"--address=$RAY_HEAD_IP:{port}" in worker[-1]
    for command in head + worker:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_groups_and_machines_come_from_the_settings_and_cpu_machines_offer_the_loader_resource(tmp_path: Path) -> None:
    for name in ("aws", "gcp"):
        types = rendered(INFRA / "ray" / f"{name}.yaml", GPU_NODES="12", LOADER_NODES="34")[0]["available_node_types"]
        assert (types["gpu"]["max_workers"], types["loader"]["max_workers"]) == (12, 34)
        assert (types["gpu"]["resources"]["GPU"], types["loader"]["resources"]["loader"]) == (8, 1)
        assert types["head"]["resources"] == {"CPU": 0}
    (config,) = rendered(INFRA / "ray" / "on_premise.yaml", WORKER_IPS="10.1.1.1, 10.1.1.2, 10.1.1.3")
    assert config["provider"]["worker_ips"] == ["10.1.1.1", "10.1.1.2", "10.1.1.3"]
    # The hard limit of the test process may be lower than the container's.
    command = config["worker_start_ray_commands"][-1].replace("ulimit -n 65536", "true")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.10"}
    for status, expected in ((0, []), (1, [{"loader": 1}])):  # of nvidia-smi: with and without a GPU
        write_program(tmp_path / "nvidia-smi", f"exit {status}")
        write_program(tmp_path / "ray", 'printf "%s\\n" "$@"')
        output = subprocess.check_output(["bash", "-c", command], text=True, env=environment)
        assert [json.loads(text) for text in re.findall(r"^--resources=(.*)$", output, re.MULTILINE)] == expected


COMPOSE = (INFRA / "compose.yaml").read_text()
SECRETS = {"POSTGRES_PASSWORD", "STORE_ACCESS_KEY", "STORE_SECRET_KEY", "RAY_AUTH_TOKEN"}
INTERPOLATED = re.compile(r"\$\{(\w+):\?[^}]*\}")
CONFIG: dict[str, Any] = yaml.safe_load(INTERPOLATED.sub(lambda match: VALUES[match[1]] or f"the-{match[1]}", COMPOSE))
SERVICES: dict[str, dict[str, Any]] = CONFIG["services"]


def test_compose_needs_every_value_holds_no_secret_and_exposes_no_port() -> None:
    assert len(re.findall(r"\$\{", COMPOSE)) == len(INTERPOLATED.findall(COMPOSE)), "a ${…} without :? may be empty"
    assert set(INTERPOLATED.findall(COMPOSE)) == set(VALUES)
    assert {name for name, value in VALUES.items() if not value} == SECRETS
    if (ROOT / ".git").exists():
        for name, is_ignored in (("infra/compose.env", True), ("infra/compose.example.env", False)):
            check = ["git", "check-ignore", "--quiet", name]
            assert (subprocess.run(check, cwd=ROOT, check=False).returncode == 0) == is_ignored
    for service in SERVICES.values():
        assert (service["security_opt"], service["cap_drop"]) == (["no-new-privileges:true"], ["ALL"])
        visible = yaml.safe_dump([service.get("command", []), service.get("healthcheck", {})])  # to all users
        assert [secret for secret in SECRETS if secret in visible] == []
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports == {name: [f"127.0.0.1:{n}:{n}"] for name, n in {"store": 7070, "mlflow": 5000, "head": 8265}.items()}
    addressed = dict(re.findall(r"\b(database|store|mlflow):(\d{4})\b", COMPOSE))
    assert addressed == {"database": "5432", "store": "7070", "mlflow": "5000"}
    assert SERVICES["store"]["environment"]["VGW_PORT"] == ":7070"
    assert SERVICES["mlflow"]["command"][SERVICES["mlflow"]["command"].index("--port") + 1] == "5000"
    assert "--dashboard-port=8265" in SERVICES["head"]["command"]
    environment = SERVICES["head"]["environment"]
    assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", "the-RAY_AUTH_TOKEN")
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in SERVICES, f"{name} waits for {other}"
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[other]
            is_once = how["condition"] == "service_completed_successfully"
            assert not is_once or SERVICES[other]["restart"] == "on-failure", f"{other} would be restarted forever"
        for source in (volume.split(":")[0] for volume in service.get("volumes", [])):
            assert (INFRA / source).is_file() if source.startswith(".") else source in CONFIG["volumes"]
    for build in (SERVICES[name]["build"] for name in ("bucket", "mlflow", "head")):
        assert (INFRA / build["context"] / build["dockerfile"]).resolve() == INFRA / "Dockerfile"
    for image in (SERVICES[name]["image"] for name in ("database", "store")):
        assert re.search(r":v?\d+\.\d+[\w.-]*$", image), image
    assert set(yaml.safe_load((INFRA / "compose.gpu.yaml").read_text())["services"]) == {"head"}
    assert "deploy" not in SERVICES["head"]


def test_mlflow_knows_its_arguments_and_the_bucket_may_exist(
    moto_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in moto_store.environment.items():
        monkeypatch.setenv(name, value)
    make_bucket = runpy.run_path(str(INFRA / "make_bucket.py"))["make_bucket"]
    for _ in range(2):
        make_bucket("mome-compose")
    assert [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]].count("mome-compose") == 1


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    env = tmp_path / "compose.env"
    env.write_text("".join(f"{name}={value or 'x'}\n" for name, value in VALUES.items()))
    files = ["--file", str(INFRA / "compose.yaml"), "--file", str(INFRA / "compose.gpu.yaml")]
    subprocess.run([docker, "compose", "--env-file", str(env), *files, "config", "--quiet"], check=True)


# (INSTRUCTION, arguments) by build stage, with continued lines joined and without comments; "" before the first stage
STAGES: dict[str, list[tuple[str, str]]] = defaultdict(list)
_text, _stage = re.sub(r"(?m)^\s*#.*\n", "", (INFRA / "Dockerfile").read_text()), ""
for _line in filter(None, re.sub(r"\\\n\s*", " ", _text).splitlines()):
    _word, _, _rest = _line.partition(" ")
    _stage = _rest.split(" AS ")[1] if _word == "FROM" else _stage
    STAGES[_stage].append((_word, _rest.strip()))
RUN = STAGES["run"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_image_is_unprivileged_with_copied_files_and_hashed_packages() -> None:
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
    assert {word for stage in STAGES.values() for word, _ in stage} <= known
    assert list(STAGES) == ["", "build", "run"]
    assert ("COPY", "--from=build /opt/mome /opt/mome") in RUN
    ((word, base),) = STAGES[""]
    assert word == "ARG"
    version = re.fullmatch(r"PYTHON_IMAGE=python:(\d+\.\d+)\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
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
    copies = [rest for stage in STAGES.values() for word, rest in stage if word == "COPY"]
    copied = [source for rest in copies if not rest.startswith("--from") for source in rest.split()[:-1]]
    assert {"pipeline", "jobs", "configs", "setup.py"} <= set(copied)
    assert [source for source in copied if not (ROOT / source).exists() or is_ignored(source)] == []
    others = [".git", ".venv", "runs/demo", "infra/compose.env", "settings.env", "tests"]
    assert [path for path in others if not is_ignored(path)] == []
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
    assert {f"{name}=={version}".lower() for name, version in PINS.items() if name.lower() in ours} <= set(locked)
    extra = [line for line in (INFRA / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in extra)
    assert set(extra) <= set(locked)
    # Released together, with requirements on each other's version.
    assert dict(line.split("==") for line in extra)["boto3"] == PINS["botocore"]


def is_ignored(path: str) -> bool:
    """Apply Docker's rule: the last pattern that matches the path or a parent folder decides."""
    parts = [Path(path), *Path(path).parents[:-1]]
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    matching = [line for line in lines if any(fnmatch.fnmatch(str(part), line.removeprefix("!")) for part in parts)]
    return bool(matching) and not matching[-1].startswith("!")


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Return start(srun="exit 1", **environment), which runs the job script as Slurm does on the first node."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()

    def begin(srun: str, **environment: str) -> subprocess.Popen[str]:
        (calls := tmp_path / "calls").unlink(missing_ok=True)
        write_program(tmp_path / "srun", f'printf "%s " srun "$@" >> {calls}; echo >> {calls}\n{srun}')
        write_program(tmp_path / "scancel", f'echo scancel "$@" >> {calls}; kill -USR1 $(cat {tmp_path}/ranks)')
        show = f'[ "$1" = show ] && {{ echo node7; echo node8; }} || echo scontrol "$@" >> {calls}'
        write_program(tmp_path / "scontrol", show)
        slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
        base = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MOME_VENV": str(tmp_path / "venv")}
        command = ["bash", str(INFRA / "slurm.sbatch"), "configs/demo.yaml", "name=a run", "output=s3://bucket/runs"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env={**base, **slurm, **environment}, start_new_session=True, **pipes)

    return begin


def test_torchrun_starts_on_every_node_and_is_retried_unless_superseded(start: Start, tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    job = start('printf "%s\\n" "${@: -3}" > ' + str(tmp_path / "last"), SLURM_GPUS_ON_NODE="8")
    assert job.wait(30) == 0
    (step,) = (tmp_path / "calls").read_text().splitlines()
    for expected in ("--nnodes 2", "--nproc-per-node 8", "--rdzv-endpoint node7:29400", "-m pipeline.training"):
        assert expected in step
    assert (tmp_path / "last").read_text().splitlines() == [
        "configs/demo.yaml",
        "name=a run",
        "output=s3://bucket/runs",
    ]
    parsed = get_args_parser().parse_args(step.partition("torchrun ")[2].split())
    assert "SIGUSR1" in parsed.signals_to_handle  # passed on to the ranks
    assert parsed.shutdown_timeout < 120  # of --signal=B:USR1@120
    assert parsed.max_restarts == 0  # ranks that saved and ended must not be restarted
    assert start(f"[ $(wc -l < {tmp_path}/calls) = 3 ]").wait(30) == 0  # the third attempt succeeds
    steps = (tmp_path / "calls").read_text().splitlines()
    rendezvous = {step.split("--rdzv-id ")[1].split()[0] for step in steps}
    assert (len(steps), len(rendezvous)) == (3, 3), "each attempt has its own rendezvous"
    job = start("exit 7", MOME_MAX_FAILURES="1")
    output, _ = job.communicate(timeout=30)
    assert (job.returncode, len((tmp_path / "calls").read_text().splitlines())) == (7, 2)
    assert "failed 2 times, the last with status 7" in output
    # Retries share a claim; another start of the same job has its own.
    write_program(tmp_path / "python", f'printf "%s " "$MOME_CLAIM" "$@" > {tmp_path}/owner\nexit 76')
    for restart in ("0", "3"):
        job = start("exit 1", SLURM_RESTART_COUNT=restart)
        output, _ = job.communicate(timeout=30)
        assert job.returncode == 76, output
        assert (tmp_path / "calls").read_text().count("srun") == 1
        claim = f"slurm--17-{restart} -m pipeline.training.ownership configs/demo.yaml name=a"
        assert (tmp_path / "owner").read_text().startswith(claim)


@pytest.mark.parametrize("sent", ["USR1", "TERM"])
def test_preemption_is_passed_to_the_ranks_and_requeues_the_job(sent: str, start: Start, tmp_path: Path) -> None:
    saves = f"trap 'echo saved >> {tmp_path}/calls; exit 1' USR1"
    job, deadline = start(f"{saves}; echo $$ > {tmp_path}/ranks; while :; do sleep 0.1; done"), time.monotonic() + 30
    while not (tmp_path / "ranks").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(job.pid, getattr(signal, f"SIG{sent}"))  # to the script alone, as --signal=B: does
    output, _ = job.communicate(timeout=30)
    calls = (tmp_path / "calls").read_text().splitlines()[1:]
    assert calls == [f"scancel --signal={sent} 17", "saved", "scontrol requeue 17"], output
    assert job.returncode == 0


def test_scripts_are_valid_bash_and_explain_what_is_missing_or_taken(moto_store: Store, tmp_path: Path) -> None:
    command = ["bash", str(INFRA / "local_s3.sh"), port := moto_store.endpoint.rpartition(":")[2], "not-made"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if "not installed" in done.stderr:
        pytest.skip("this checkout has no .venv")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"port {port} is taken" in done.stderr
    assert "is served" not in done.stderr
    keys = {"aws_access_key_id": moto_store.key, "aws_secret_access_key": moto_store.secret}
    client = boto3.client("s3", "us-east-1", endpoint_url=moto_store.endpoint, **keys)
    assert "not-made" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
    for path in [*INFRA.glob("*.sh"), *INFRA.glob("*.sbatch")]:
        subprocess.run(["bash", "-n", str(path)], check=True)
        assert os.access(path, os.X_OK), path
    (tmp_path / "infra").mkdir()
    script = shutil.copy(INFRA / "local_s3.sh", tmp_path / "infra" / "local_s3.sh")
    unprepared = "Run 'make .venv/installed' in the checkout first"
    for path, message in ((script, unprepared), (INFRA / "slurm.sbatch", "usage: sbatch")):
        done = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, message in done.stderr) == (2, True)
