"""The dependency rule of the README: imports point down only, and each heavy library has one home."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("jobs/**/*.py")])

LEVELS = {
    "pipeline.config": 0,
    "pipeline.models": 1,
    "pipeline.objectives": 2,  # depends on models and batches
    "pipeline.data": 1,
    "pipeline.tracking": 2,  # depends on the storage
    "pipeline.pages": 1,
    "pipeline.planning": 2,  # depends on models and data; used by training to find what fits
    "pipeline.evaluation": 3,
    "pipeline.training": 4,  # training evaluates at intervals
    "pipeline.reports": 5,  # reads what training and evaluation wrote to a run's folder
    "pipeline.inference": 6,  # the Python API for trained weights
    "jobs": 7,
}

HOMES = {
    "ray": ("jobs/",),
    "deepspeed": ("pipeline/training/deepspeed_",),
    "mlflow": ("pipeline/tracking/mlflow_",),
    "torch.distributed": ("pipeline/training/collectives.py", "pipeline/training/deepspeed_engine.py"),
    "fsspec": ("pipeline/data/storage/__init__.py", "jobs/bench/"),
    "s3fs": ("jobs/bench/",),
    "botocore": ("pipeline/data/storage/s3.py", "jobs/bench/"),
}


def package_of(module: str) -> str | None:
    return next((name for name in LEVELS if module == name or module.startswith(f"{name}.")), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only_and_heavy_libraries_have_one_home(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    own = package_of(where.removesuffix(".py").replace("/", "."))
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for module in modules:
        other = package_of(module)
        if own is not None and other is not None:  # None: pipeline/__init__.py, libraries
            assert other == own or LEVELS[other] < LEVELS[own], f"{own} imports {module}"
        if own == "pipeline.planning":
            assert other in {"pipeline.planning", "pipeline.config", "pipeline.models", "pipeline.data", None}
        for library, homes in HOMES.items():
            if module == library or module.startswith(f"{library}."):
                assert where.startswith(homes), f"{where} imports {module}; it belongs in {homes}"
