"""Files rendered for KubeRay and Ray's launcher are valid, parsed as intended by Ray, and secured.

Rendering replaces every variable, each of which has a value and an explanation, or fails.
"""

import copy
import itertools
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from tests.support.rendered_infra import EXAMPLE, INFRA, example_settings, pins, render, rendered

KUBERAY, RAY = INFRA / "kuberay", sorted(INFRA.glob("ray/*.yaml"))
KINDS = {"raycluster": "rayclusters", "rayjob": "rayjobs"}
FILES = sorted([*KUBERAY.glob("*.yaml"), *RAY])
SECRET = re.compile(r"password|secret|token|access_key", re.IGNORECASE)


# ---- rendering


def test_the_example_sets_and_explains_every_variable() -> None:
    """A comment, or another setting explained by the same comment, is directly above."""
    assert set(example_settings()) == set().union(*(render.variables(path) for path in FILES))
    for path in FILES:
        assert "${" not in render.render(path, example_settings()), path
    for above, line in itertools.pairwise(EXAMPLE.read_text().splitlines()):
        assert "=" not in line or line.startswith("#") or above.startswith("#") or "=" in above, line


@pytest.mark.parametrize(
    ("settings", "arguments", "status", "out", "error"),
    [
        ("ONE=1", [], 2, "", "no value for TWO"),
        ("ONE=1\nTWO=", [], 2, "", "no value for TWO"),
        ("# mine\n\nONE=1\nTWO=2", ["ONE=3"], 0, "a: 3\nb: 2-3\nc: $RAY_HEAD_IP $(date)\n", ""),
        ("TWO=2\nexport ONE=1", [], 2, "", "my.env, line 2"),
        ("TWO=2\nONE", [], 2, "", "my.env, line 2"),
        ("TWO=2\none=1", [], 2, "", "my.env, line 2"),
    ],
)
def test_arguments_override_settings_and_missing_or_invalid_ones_are_named(
    settings: str, arguments: list[str], status: int, out: str, error: str, tmp_path: Path, capsys: Any
) -> None:
    file, env = tmp_path / "file.yaml", tmp_path / "my.env"
    file.write_text("a: ${ONE}\nb: ${TWO}-${ONE}\nc: $RAY_HEAD_IP $(date)\n")
    env.write_text(settings)
    assert render.main([str(file), str(env), *arguments]) == status
    output = capsys.readouterr()
    assert output.out == out
    assert error in output.err


# ---- KubeRay


@pytest.fixture(params=KINDS)
def spec(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the specification of the cluster in each kind of manifest."""
    cluster = rendered(KUBERAY / f"{request.param}.yaml")[0]["spec"]
    return cluster.get("rayClusterSpec", cluster)


@cache
def definition(kind: str, folder: Path) -> dict[str, Any]:
    """Return the schema of a custom resource with unknown keys forbidden, because Kubernetes drops them silently."""
    text = (folder / f"ray.io_{kind}.yaml").read_text()
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema: dict[str, Any] = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object"}  # of Kubernetes itself, not described there
    pending = [schema]
    while pending:
        place = pending.pop()
        if "properties" in place:
            place.setdefault("additionalProperties", False)
        inner = [*place.get("properties", {}).values(), place.get("items"), place.get("additionalProperties")]
        pending += [value for value in inner if isinstance(value, dict)]
    return schema


def test_manifests_are_valid_for_kuberay_and_wrong_keys_and_values_are_not(shared: Path) -> None:
    folder = shared / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip("../shared/schemas/kuberay is absent: it holds KubeRay's definitions")
    for name, kind in KINDS.items():
        (valid,) = rendered(KUBERAY / f"{name}.yaml")
        validator = jsonschema.Draft202012Validator(definition(kind, folder))
        assert list(validator.iter_errors(valid)) == []
    for path, value in {  # of the job, the last one
        "spec.backoffLimits": 3,
        "spec.backoffLimit": "three",
        "spec.rayClusterSpec.authOptions.mode": "password",
        "spec.rayClusterSpec.networkPolicy.mode": "DenyEverybody",
        "spec.rayClusterSpec.headGroupSpec.template.spec.restartpolicy": "Never",
    }.items():
        place = manifest = copy.deepcopy(valid)
        *parents, key = path.split(".")
        for parent in parents:
            place = place[parent]
        place[key] = value
        assert len(list(validator.iter_errors(manifest))) == 1, path


def test_rays_autoscaler_parses_the_groups(spec: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive

    read = derive({"metadata": {"name": "mome", "namespace": "mome"}, "spec": spec})
    types = {name: (kind["max_workers"], kind["resources"]) for name, kind in read["available_node_types"].items()}
    assert types["headgroup"] == (0, {"CPU": 0, "memory": 16 * 2**30})
    assert types["gpu"] == (4, {"CPU": 96, "GPU": 8, "memory": 800 * 2**30})
    workers, resources = types["loader"]
    assert workers == 4
    assert resources["loader"] == 1  # the resource of which cluster.loader_resource requests a thousandth
    assert resources["CPU"] == 30
    assert "GPU" not in resources
    assert read["idle_timeout_minutes"] == 10


def test_access_needs_a_token_and_containers_have_limits_and_never_run_as_root(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["networkPolicy"]["mode"] in ("DenyAll", "DenyAllIngress")
    for rule in spec["networkPolicy"]["head"]["ingressRules"]:
        assert rule["from"], "a rule without `from` lets everybody in"
        assert [port["port"] for port in rule["ports"]] == [8265]
    assert "serviceType" not in spec["headGroupSpec"]  # ClusterIP: reached by kubectl port-forward
    assert spec["rayVersion"] == pins()["ray"]
    (mount,) = spec["autoscalerOptions"]["volumeMounts"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    assert mount["name"] in {volume["name"] for volume in spec["headGroupSpec"]["template"]["spec"]["volumes"]}
    contexts = [spec["autoscalerOptions"]["securityContext"]]
    for pod in [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]:
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} - {mount["name"]}
        assert pod["automountServiceAccountToken"] is False
        sources = {volume["name"]: volume.get("projected", {}).get("sources", []) for volume in pod["volumes"]}
        tokens = {name for name, listed in sources.items() if any("serviceAccountToken" in each for each in listed)}
        assert tokens.isdisjoint(mounted)
        for container in pod["containers"]:
            contexts.append(container["securityContext"])
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["image"] == "registry.example.com/mome:0.1.0"
    for context in contexts:
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 1000)
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_secrets_are_references_only() -> None:
    pending: list[Any] = [document for path in KUBERAY.glob("*.yaml") for document in rendered(path)]
    assert "Secret" not in {document.get("kind") for document in pending}
    secrets = []
    while pending:
        node = pending.pop()
        if isinstance(node, dict) and set(node) in ({"name", "value"}, {"name", "valueFrom"}):
            secrets += [node] if SECRET.search(node["name"]) else []
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    assert len(secrets) > 5
    assert all(set(variable.get("valueFrom", ())) == {"secretKeyRef"} for variable in secrets)


def test_a_job_is_retried_with_its_claim_and_cleans_up() -> None:
    """KubeRay retries with the manifest's entry point; every rendering is a new launch."""
    ((job,), (another,)) = (rendered(KUBERAY / "rayjob.yaml", JOB_RETRIES="7") for _ in range(2))
    assert job["spec"]["backoffLimit"] == 7
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "gcsFaultToleranceOptions" not in job["spec"]["rayClusterSpec"]  # a new cluster would not read it
    claim = re.compile(r"env MOME_CLAIM=([0-9a-f]{16}) mome train ")
    assert claim.match(job["spec"]["entrypoint"])[1] != claim.match(another["spec"]["entrypoint"])[1]


def test_a_permanent_cluster_survives_the_loss_of_its_head() -> None:
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


def test_the_job_runs_an_existing_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`mome train` parses the arguments, with the demo's config instead of the mounted one."""
    from jobs import cli, train

    (job,) = rendered(KUBERAY / "rayjob.yaml")
    env, _, program, command, config, *rest = job["spec"]["entrypoint"].split()
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mount = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "run")
    assert (env, program, config) == ("env", "mome", f"{mount['mountPath']}/run.yaml")
    trained = []
    monkeypatch.setattr(train, "pretrain", lambda settings, *_: trained.append(settings))
    demo = str(INFRA.parent / "configs" / "demo.yaml")
    CliRunner().invoke(cli.app, [command, demo, f"output={tmp_path}", *rest])
    assert [settings.cluster.address for settings in trained] == ["auto"]


# ---- Ray's launcher


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
    assert "--dashboard-host=127.0.0.1" in head[-1]
    assert "--dashboard-port=8265" in head[-1]
    (port,) = re.findall(r"--port=(\d+)", head[-1])
    assert f"--address=$RAY_HEAD_IP:{port}" in worker[-1]
    for command in head + worker:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_groups_and_machines_come_from_the_settings() -> None:
    for name in ("aws", "gcp"):
        types = rendered(INFRA / "ray" / f"{name}.yaml", GPU_NODES="12", LOADER_NODES="34")[0]["available_node_types"]
        assert (types["gpu"]["max_workers"], types["loader"]["max_workers"]) == (12, 34)
        assert (types["gpu"]["resources"]["GPU"], types["loader"]["resources"]["loader"]) == (8, 1)
        assert types["head"]["resources"] == {"CPU": 0}
    (config,) = rendered(INFRA / "ray" / "on_premise.yaml", WORKER_IPS="10.1.1.1, 10.1.1.2, 10.1.1.3")
    assert config["provider"]["worker_ips"] == ["10.1.1.1", "10.1.1.2", "10.1.1.3"]


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, []), (False, [{"loader": 1}])])
def test_on_premise_cpu_machines_offer_the_loader_resource(
    has_gpu: bool, expected: list[dict[str, int]], tmp_path: Path
) -> None:
    for name, script in {"nvidia-smi": f"exit {0 if has_gpu else 1}", "ray": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    command = rendered(INFRA / "ray" / "on_premise.yaml")[0]["worker_start_ray_commands"][-1]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.10"}
    # The hard limit of the test process may be lower than the container's.
    command = command.replace("ulimit -n 65536", "true")
    output = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True, env=environment).stdout
    assert [json.loads(text) for text in re.findall(r"^--resources=(.*)$", output, re.MULTILINE)] == expected
