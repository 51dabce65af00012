"""What `mome doctor` tries in a process of its own: `python -m jobs.doctor.child collective|operators|cluster CONFIG`.

The last line of its output is the result; if it fails, the last line of its complaint is the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from pipeline.config.errors import MomeError
from pipeline.config.schema import ClusterConfig


def collective() -> str:
    """Every rank adds its number; all must have the same sum."""
    import torch

    from pipeline.training.collectives import Collectives

    ranks = Collectives(timeout_seconds=60.0)
    total = ranks.sum(torch.full((1024,), float(ranks.rank + 1), device=ranks.device))
    expected = ranks.world_size * (ranks.world_size + 1) / 2
    if not bool((total == expected).all()):
        raise SystemExit(f"the sum is {total[0]:g}, expected {expected:g}")
    told = "a sum agreed"
    if ranks.device.type == "cuda":
        told = f"{'.'.join(map(str, torch.cuda.nccl.version()))}, {told}"
    ranks.close()
    return told


def operators() -> str:
    from pipeline.training.deepspeed_engine import load_extensions

    load_extensions()
    return "loaded"


def cluster(values: str) -> str:
    """The resources of a Ray cluster and its version, as JSON."""
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
