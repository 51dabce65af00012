"""The resources that ranks request are compared with those of the nodes before any rank is placed."""

from __future__ import annotations

import pytest

from jobs.resources import missing_resources, requested_resources
from pipeline.config.schema import ClusterConfig

Node = dict[str, float]


def cluster(**values: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"workers": 2, **values})


ENOUGH: list[tuple[ClusterConfig, list[Node]]] = [
    (cluster(), [{"CPU": 2}]),
    (cluster(), [{"CPU": 1}, {"CPU": 1}]),
    (cluster(gpus_per_worker=0.5), [{"CPU": 2, "GPU": 1}]),
    (cluster(gpus_per_worker=0.6), [{"CPU": 2, "GPU": 2}]),
    (cluster(gpus_per_worker=0.25, workers=8), [{"CPU": 8, "GPU": 2}]),
    (cluster(cpus_per_worker=0.1, workers=10), [{"CPU": 1}]),
    (cluster(gpus_per_worker=1, workers=4, min_workers=1), [{"CPU": 8, "GPU": 1}]),
    (cluster(loader_actors=1, loader_resource="loader"), [{"CPU": 2}, {"CPU": 2, "loader": 1}]),
]


@pytest.mark.parametrize(("asked", "nodes"), ENOUGH)
def test_fitting_request_misses_no_resources(asked: ClusterConfig, nodes: list[Node]) -> None:
    assert missing_resources(asked, nodes) == []


@pytest.mark.parametrize(
    ("asked", "nodes", "told"),
    [
        (cluster(gpus_per_worker=1), [{"CPU": 4}], "2 ranks need 2 GPUs; this cluster has 0. Set cluster.gpus_per_wor"),
        (cluster(gpus_per_worker=1, workers=1), [{"CPU": 4}], "1 rank needs 1 GPU; this cluster has 0"),
        (cluster(gpus_per_worker=1), [{"CPU": 4, "GPU": 1}], "2 ranks need 2 GPUs; this cluster has 1"),
        (cluster(workers=9, min_workers=3), [{"CPU": 2}], "3 ranks need 3 CPUs; this cluster has 2. Set cluster.cpus"),
        (cluster(cpus_per_worker=8), [{"CPU": 4}] * 4, "each of 2 ranks needs 8 CPUs on one node; there is room for 0"),
        (cluster(gpus_per_worker=2), [{"CPU": 4, "GPU": 1}] * 4, "needs 1 CPU and 2 GPUs on one node"),
        (cluster(gpus_per_worker=0.7), [{"CPU": 4, "GPU": 1}] * 1, "2 ranks need 1.4 GPUs"),
        (cluster(gpus_per_worker=1), [{"CPU": 9}, {"GPU": 2, "CPU": 1}], "there is room for 1"),
        (cluster(gpus_per_worker=0.6, workers=3), [{"CPU": 9, "GPU": 2}], "there is room for 2"),
        (cluster(gpus_per_worker=0.4, workers=5), [{"CPU": 9, "GPU": 2}], "there is room for 4"),
        (cluster(loader_actors=1, loader_resource="loader"), [{"CPU": 9}], "2 ranks need 0.002 of 'loader', which"),
        (cluster(loader_actors=4), [{"CPU": 8}], "2 ranks need 10 CPUs"),
        (cluster(loader_actors=2, loader_resource="l"), [{"CPU": 9}, {"CPU": 1, "l": 1}], "on nodes that offer 'l'"),
        (cluster(), [], "2 ranks need 2 CPUs; this cluster has 0"),
    ],
)
def test_missing_resources_are_reported_with_their_keys(asked: ClusterConfig, nodes: list[Node], told: str) -> None:
    (found, *_) = missing_resources(asked, nodes)
    assert told in found
    assert "cluster." in found


def test_loader_actors_are_counted() -> None:
    asked = cluster(loader_actors=3, loader_cpus=0.5, loader_resource="loader", gpus_per_worker=1)
    assert requested_resources(asked, 2) == {"CPU": 5.0, "GPU": 2.0, "loader": 0.006}
