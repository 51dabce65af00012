"""KubeRay's manifests are valid, parsed correctly by Ray's autoscaler, and secured."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.rendered_infra import INFRA, pins, rendered

KUBERAY = INFRA / "kuberay"
KINDS = {"raycluster": "rayclusters", "rayjob": "rayjobs"}


def cluster_spec(name: str) -> dict[str, Any]:
    spec = rendered(KUBERAY / f"{name}.yaml")[0]["spec"]
    return spec.get("rayClusterSpec", spec)


def pod_specs(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


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


def faults(manifest: dict[str, Any], kind: str, shared: Path) -> list[str]:
    folder = shared / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip("../shared/schemas/kuberay is absent: it holds KubeRay's definitions")
    validator = jsonschema.Draft202012Validator(definition(kind, folder))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize("name", KINDS)
def test_manifests_are_valid_for_kuberay(name: str, shared: Path) -> None:
    (manifest,) = rendered(KUBERAY / f"{name}.yaml")
    assert faults(manifest, KINDS[name], shared) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backoffLimits", 3),
        ("spec.backoffLimit", "three"),
        ("spec.rayClusterSpec.authOptions.mode", "password"),
        ("spec.rayClusterSpec.networkPolicy.mode", "DenyEverybody"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.restartpolicy", "Never"),
    ],
)
def test_the_validation_finds_wrong_keys_and_values(path: str, value: object, shared: Path) -> None:
    (manifest,) = copy.deepcopy(rendered(KUBERAY / "rayjob.yaml"))
    *parents, key = path.split(".")
    place = manifest
    for parent in parents:
        place = place[parent]
    place[key] = value
    assert len(faults(manifest, "rayjobs", shared)) == 1


def test_retries_share_a_claim_and_launches_do_not() -> None:
    """KubeRay retries with the manifest's entry point; every rendering is a new launch."""
    ((first,), (second,)) = (rendered(KUBERAY / "rayjob.yaml") for _ in range(2))
    claim = re.compile(r"env MOME_CLAIM=([0-9a-f]{16}) mome train ")
    assert claim.match(first["spec"]["entrypoint"])[1] != claim.match(second["spec"]["entrypoint"])[1]


@pytest.mark.parametrize("name", KINDS)
def test_rays_autoscaler_parses_the_groups(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive

    metadata = {"name": "mome", "namespace": "mome"}
    read = derive({"metadata": metadata, "spec": cluster_spec(name)})
    types = {name: (kind["max_workers"], kind["resources"]) for name, kind in read["available_node_types"].items()}
    assert types["headgroup"] == (0, {"CPU": 0, "memory": 16 * 2**30})
    assert types["gpu"] == (4, {"CPU": 96, "GPU": 8, "memory": 800 * 2**30})
    workers, resources = types["loader"]
    assert workers == 4
    assert resources["loader"] == 1  # the resource of which cluster.loader_resource requests a thousandth
    assert resources["CPU"] == 30
    assert "GPU" not in resources
    assert read["idle_timeout_minutes"] == 10


@pytest.mark.parametrize("name", KINDS)
def test_access_needs_a_token_and_a_network_policy(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["networkPolicy"]["mode"] in ("DenyAll", "DenyAllIngress")
    for rule in spec["networkPolicy"]["head"]["ingressRules"]:
        assert rule["from"], "a rule without `from` lets everybody in"
        assert [port["port"] for port in rule["ports"]] == [8265]
    assert "serviceType" not in spec["headGroupSpec"]  # ClusterIP: reached by kubectl port-forward
    assert spec["rayVersion"] == pins()["ray"]


@pytest.mark.parametrize("name", KINDS)
def test_containers_have_limits_and_never_run_as_root(name: str) -> None:
    spec = cluster_spec(name)
    autoscaler = {mount["name"] for mount in spec["autoscalerOptions"]["volumeMounts"]}
    contexts = [spec["autoscalerOptions"]["securityContext"]]
    for pod in pod_specs(spec):
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} - autoscaler
        for container in pod["containers"]:
            contexts.append(container["securityContext"])
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["image"] == "registry.example.com/mome:0.1.0"
    for context in contexts:
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 1000)
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", KINDS)
def test_job_containers_have_no_kubernetes_token(name: str) -> None:
    spec = cluster_spec(name)
    for pod in pod_specs(spec):
        assert pod["automountServiceAccountToken"] is False
        tokens = {
            volume["name"]
            for volume in pod["volumes"]
            if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
        }
        assert tokens.isdisjoint(mount["name"] for each in pod["containers"] for mount in each["volumeMounts"])
    (mount,) = spec["autoscalerOptions"]["volumeMounts"]
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount"
    assert mount["name"] in {volume["name"] for volume in spec["headGroupSpec"]["template"]["spec"]["volumes"]}


SECRET = re.compile(r"password|secret|token|access_key", re.IGNORECASE)


def variables_of(node: object) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if set(node) in ({"name", "value"}, {"name", "valueFrom"}):
            yield node
        for inner in node.values():
            yield from variables_of(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from variables_of(inner)


@pytest.mark.parametrize("path", sorted(set(KUBERAY.glob("*.yaml"))), ids=lambda path: path.name)
def test_secrets_are_references_only(path: Path) -> None:
    documents = rendered(path)
    assert not any(document.get("kind") == "Secret" for document in documents)
    for variable in variables_of(documents):
        if SECRET.search(variable["name"]):
            assert set(variable["valueFrom"]) == {"secretKeyRef"}, variable["name"]


def test_a_job_is_retried_and_cleans_up() -> None:
    (job,) = rendered(KUBERAY / "rayjob.yaml", JOB_RETRIES="7")
    assert job["spec"]["backoffLimit"] == 7
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "gcsFaultToleranceOptions" not in job["spec"]["rayClusterSpec"]  # a new cluster would not read it


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
    from typer.testing import CliRunner

    from jobs import cli, train

    (job,) = rendered(KUBERAY / "rayjob.yaml")
    env, _, program, command, config, *rest = job["spec"]["entrypoint"].split()
    head = pod_specs(job["spec"]["rayClusterSpec"])[0]
    mount = next(mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "run")
    assert (env, program, config) == ("env", "mome", f"{mount['mountPath']}/run.yaml")
    trained = []
    monkeypatch.setattr(train, "pretrain", lambda settings, *_: trained.append(settings))
    demo = str(INFRA.parent / "configs" / "demo.yaml")
    CliRunner().invoke(cli.app, [command, demo, f"output={tmp_path}", *rest])
    assert [settings.cluster.address for settings in trained] == ["auto"]
