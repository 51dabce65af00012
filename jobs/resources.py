"""Resources that a run's ranks request, compared with what the nodes of a cluster have. Needs no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pipeline.config.schema import ClusterConfig

LOADER_AMOUNT = 0.001  # of `cluster.loader_resource` per loader actor; CPUs limit the number of actors per node
KEYS = {"CPU": "cluster.cpus_per_worker", "GPU": "cluster.gpus_per_worker"}

Resources = Mapping[str, float]


def rank_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Return what Ray reserves for each rank on one node."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


def requested_resources(cluster: ClusterConfig, ranks: int) -> dict[str, float]:
    """Return what `ranks` ranks and their loader actors request in total."""
    total = {kind: ranks * amount for kind, amount in rank_resources(cluster).items()}
    actors = ranks * cluster.loader_actors
    if actors:
        total["CPU"] += actors * cluster.loader_cpus
        if cluster.loader_resource is not None:
            total[cluster.loader_resource] = actors * LOADER_AMOUNT
    return total


def total_resources(nodes: Iterable[Resources]) -> dict[str, float]:
    """Return what all nodes have in total."""
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node)
    return dict(total)


def missing_resources(cluster: ClusterConfig, nodes: Sequence[Resources]) -> list[str]:
    """Return a message for each resource that empty nodes lack for the minimum number of ranks; empty if they fit.

    A message states what is requested, what exists, and which keys change it.
    """
    ranks = cluster.min_workers or cluster.workers
    existing = total_resources(nodes)
    messages = [
        _shortage(cluster, ranks, kind, number, existing.get(kind, 0.0))
        for kind, number in requested_resources(cluster, ranks).items()
        if number > existing.get(kind, 0.0)
    ]
    if messages:
        return messages
    per_rank = rank_resources(cluster)
    room = sum(ranks_on_node(node, per_rank) for node in nodes)
    if room < ranks:
        needs = " and ".join(f"{amount:g} {plural(kind, amount)}" for kind, amount in per_rank.items())
        largest = ", ".join(f"{max(node.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in per_rank)
        return [
            f"each of {ranks} ranks needs {needs} on one node; there is room for {room} (most on a node: {largest}). "
            f"Set {' or '.join(KEYS[kind] for kind in per_rank)} or cluster.workers lower, or use larger nodes"
        ]
    # Loader actors are placed one by one, on any node with a free CPU and the named resource.
    actors, name = ranks * cluster.loader_actors, cluster.loader_resource
    if actors and name is not None:
        cpus = sum(node.get("CPU", 0.0) for node in nodes if node.get(name, 0.0) >= LOADER_AMOUNT)
        if cpus < actors * cluster.loader_cpus:
            return [
                f"{actors} loader actors need {actors * cluster.loader_cpus:g} CPUs on nodes that offer '{name}'; "
                f"those have {cpus:g}. Set cluster.loader_actors or cluster.loader_cpus lower, or add such nodes"
            ]
    return []


def ranks_on_node(node: Resources, per_rank: Resources) -> int:
    """Return how many ranks fit on a node. Two GPUs have no room for three ranks of 0.6: a fraction is of one GPU."""

    def fitting(kind: str, amount: float) -> int:
        existing = node.get(kind, 0.0) + 1e-9
        return int(existing) * int(1 / amount + 1e-9) if kind == "GPU" and amount < 1 else int(existing / amount)

    return min(fitting(kind, amount) for kind, amount in per_rank.items())


def _shortage(cluster: ClusterConfig, ranks: int, kind: str, number: float, existing: float) -> str:
    needs = f"{ranks} {'rank needs' if ranks == 1 else 'ranks need'} {number:g}"
    if kind == cluster.loader_resource:
        return (
            f"{needs} of '{kind}', which cluster.loader_resource names; this cluster has {existing:g}. Start nodes "
            f"that offer it (ray start --resources='{{\"{kind}\": 1}}'), or leave cluster.loader_resource out"
        )
    fewer = "cluster.min_workers" if cluster.min_workers else "cluster.workers"
    if kind == "GPU":
        remedy = f"Set cluster.gpus_per_worker=0 to train on CPU, set {fewer} lower"
    else:
        loaders = ", cluster.loader_actors" if cluster.loader_actors else ""
        remedy = f"Set {KEYS[kind]}{loaders} or {fewer} lower"
    return f"{needs} {plural(kind, number)}; this cluster has {existing:g}. {remedy}, or use a larger cluster"


def plural(kind: str, number: float) -> str:
    """Return "CPU" or "CPUs", "GPU" or "GPUs"; other resources have no plural."""
    return kind if number == 1 or kind not in KEYS else f"{kind}s"
