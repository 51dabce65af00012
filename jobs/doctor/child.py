"""Checks that run in their own process: `python -m jobs.doctor.child collective|operators|cluster CONFIG`.

The last line of standard output is the result; after a failure, the last line of standard error is the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from pipeline.config.errors import MomeError
from pipeline.config.schema import ClusterConfig


def collective() -> str:
    """Sum a tensor over all ranks and verify the result."""
    import torch

    from pipeline.training.collectives import Collectives

    ranks = Collectives(timeout_seconds=60.0)
    total = ranks.sum(torch.full((1024,), float(ranks.rank + 1), device=ranks.device))
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    if not bool((total == expected).all()):
        raise SystemExit(f"the sum is {total[0]:g}, expected {expected:g}")
    result = "all-reduce verified"
    if ranks.device.type == "cuda":
        result = f"{'.'.join(map(str, torch.cuda.nccl.version()))}, {result}"
    ranks.close()
    return result


def operators() -> str:
    from pipeline.training.deepspeed_setup import load_extensions

    load_extensions()
    return "loaded"


def cluster(values: str) -> str:
    """Return the number of nodes, resources and version of a Ray cluster as JSON."""
    import ray

    from jobs.cluster import connect

    connect(ClusterConfig.model_validate_json(values))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return json.dumps({"nodes": len(nodes), "resources": ray.cluster_resources(), "ray": ray.__version__})


def main(task: str, *arguments: str) -> None:
    tasks: dict[str, Callable[..., str]] = {"collective": collective, "operators": operators, "cluster": cluster}
    try:
        print(tasks[task](*arguments))
    except MomeError as error:
        raise SystemExit(" ".join(str(error).split())) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
