"""What a run's ranks ask of a cluster, compared with what its nodes have. Pure arithmetic: nothing is asked of Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from pipeline.config.schema import ClusterConfig

LOADER_SHARE = 0.001  # of `cluster.loader_resource` that each loader actor takes: cores bound how many a node has
KEYS = {"CPU": "cluster.cpus_per_worker", "GPU": "cluster.gpus_per_worker"}  # what a rank asks for is set by

Resources = Mapping[str, float]


def resources_of_rank(cluster: ClusterConfig) -> dict[str, float]:
    """Return what Ray reserves for each rank, on one node."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


def requested(cluster: ClusterConfig, ranks: int) -> dict[str, float]:
    """Return what so many ranks and their loader actors ask for together."""
    total = {kind: ranks * amount for kind, amount in resources_of_rank(cluster).items()}
    actors = ranks * cluster.loader_actors
    if actors:
        total["CPU"] += actors * cluster.loader_cpus
        if cluster.loader_resource is not None:
            total[cluster.loader_resource] = actors * LOADER_SHARE
    return total


def offered(nodes: Iterable[Resources]) -> dict[str, float]:
    """Return what all nodes have together."""
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node)
    return dict(total)


def lacking(cluster: ClusterConfig, nodes: Sequence[Resources]) -> list[str]:
    """Return what the nodes are short of for the fewest ranks that the run begins with, if nothing else ran there.

    One sentence for each resource: what is asked for, what there is, which keys change it.
    """
    ranks = cluster.min_workers or cluster.workers
    has = offered(nodes)
    told = [
        _told(cluster, ranks, kind, number, has.get(kind, 0.0))
        for kind, number in requested(cluster, ranks).items()
        if number > has.get(kind, 0.0)
    ]
    if told:
        return told
    each = resources_of_rank(cluster)
    room = sum(room_on(node, each) for node in nodes)
    if room < ranks:
        wanted = " and ".join(f"{amount:g} {plural(kind, amount)}" for kind, amount in each.items())
        largest = ", ".join(f"{max(node.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in each)
        return [
            f"each of {ranks} ranks needs {wanted} on one node; there is room for {room} (most on a node: {largest}). "
            f"Set {' or '.join(KEYS[kind] for kind in each)} or cluster.workers lower, or use larger nodes"
        ]
    return _lacking_loaders(cluster, ranks, nodes)


def room_on(node: Resources, each: Resources) -> int:
    """Return how many ranks fit on a node."""
    return min(_fitting(kind, node.get(kind, 0.0), amount) for kind, amount in each.items())


def _fitting(kind: str, has: float, amount: float) -> int:
    """A fraction of a GPU is of one of them: two GPUs have no room for three ranks of 0.6."""
    if kind == "GPU" and amount < 1:
        return int(has + 1e-9) * int(1 / amount + 1e-9)
    return int(has / amount + 1e-9)


def _lacking_loaders(cluster: ClusterConfig, ranks: int, nodes: Sequence[Resources]) -> list[str]:
    """Loader actors are placed one by one, on whichever node has a core for them, and the named resource."""
    actors, name = ranks * cluster.loader_actors, cluster.loader_resource
    if not actors or name is None:
        return []
    suited = [node for node in nodes if node.get(name, 0.0) >= LOADER_SHARE]
    cores = sum(node.get("CPU", 0.0) for node in suited)
    if cores >= actors * cluster.loader_cpus:
        return []
    return [
        f"{actors} loader actors need {actors * cluster.loader_cpus:g} CPUs on nodes that offer '{name}'; those have "
        f"{cores:g}. Set cluster.loader_actors or cluster.loader_cpus lower, or add such nodes"
    ]


def _told(cluster: ClusterConfig, ranks: int, kind: str, number: float, has: float) -> str:
    asked = f"{ranks} {'rank needs' if ranks == 1 else 'ranks need'} {number:g}"
    if kind == cluster.loader_resource:
        return (
            f"{asked} of '{kind}', which cluster.loader_resource names; this cluster has {has:g}. Start nodes that "
            f"offer it (ray start --resources='{{\"{kind}\": 1}}'), or leave cluster.loader_resource out"
        )
    fewer = "cluster.min_workers" if cluster.min_workers else "cluster.workers"
    if kind == "GPU":
        remedy = f"Set cluster.gpus_per_worker=0 to train on CPU, set {fewer} lower"
    else:
        loaders = ", cluster.loader_actors" if cluster.loader_actors else ""
        remedy = f"Set {KEYS[kind]}{loaders} or {fewer} lower"
    return f"{asked} {plural(kind, number)}; this cluster has {has:g}. {remedy}, or use a cluster that has as many"


def plural(kind: str, number: float) -> str:
    return kind if number == 1 or kind not in KEYS else f"{kind}s"
