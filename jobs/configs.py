"""Configs of runs: the recipes of this package, their JSON schema, objectives by model, and the data's fingerprint."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, get_args

from jobs.console import aligned
from pipeline.config.errors import ConfigError


def configs_folder() -> Path:
    """Return the folder of the recipes: `configs/` of the checkout, or `mome/configs` of the wheel (see setup.py)."""
    root = Path(__file__).resolve().parents[1]
    installed = root / "mome" / "configs"
    return installed if installed.is_dir() else root / "configs"


def list_recipes() -> dict[str, str]:
    """Return the kind of model and the stages of every recipe by name, such as `finetune/vilt_b32_vqa`."""
    import yaml

    folder, recipes = configs_folder(), {}
    for path in sorted(folder.rglob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = " → ".join(stage["name"] for stage in values["stages"])
        recipes[path.relative_to(folder).with_suffix("").as_posix()] = (
            f"{values.get('model', {}).get('kind', 'vlmo')}: {stages}"
        )
    return recipes


def read_recipe(name: str) -> str:
    """Return the YAML text of a recipe. Raises ConfigError for an unknown name."""
    recipes = list_recipes()
    name = name.removeprefix("configs/").removesuffix(".yaml")
    if name not in recipes:
        raise ConfigError(f"no recipe {name!r}; expected one of {', '.join(recipes)}")
    return (configs_folder() / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def _skeleton(kind: str) -> Any:
    from pipeline.config.schema import MODEL_SECTIONS
    from pipeline.models import skeleton

    return skeleton(MODEL_SECTIONS[kind].model_validate({}))


def source_types(objective: str, kind: str) -> list[str]:
    """Return the source types from which a kind of model learns the objective; empty if it does not learn it."""
    from pipeline.config.schema import SourceType
    from pipeline.objectives import modules_for

    return [name for name in get_args(SourceType) if modules_for(_skeleton(kind), objective, name) is not None]


def objectives_table() -> tuple[dict[str, dict[str, list[str]]], str]:
    """Return the source types by objective and kind of model, and as text with a line per objective."""
    from pipeline.config.schema import MODEL_SECTIONS, objective_names

    table, lines = {}, [["objective", *MODEL_SECTIONS]]
    for objective in objective_names():
        types = {kind: source_types(objective, kind) for kind in MODEL_SECTIONS}
        table[objective] = {kind: names for kind, names in types.items() if names}
        lines.append([objective, *(", ".join(names) or "·" for names in types.values())])
    return table, aligned(lines)


def fingerprint_of(
    config: Any, stage: str | None, steps: str, world_size: int, workers: int, threads: int
) -> dict[str, Any]:
    """Hash the batches of steps A:B, read as `world_size` ranks with that many loader processes and threads read them.

    Nothing is written to the run's folder. Raises ConfigError for an invalid range, and whenever `mome train` would.
    """
    from pipeline.config.load import with_absolute_paths
    from pipeline.config.schema import parse_steps
    from pipeline.data.loading.loader import fingerprint
    from pipeline.data.storage import Storage
    from pipeline.objectives import batch_groups
    from pipeline.training.prepare import apart, prepare

    try:
        first, last = parse_steps(steps)
    except ValueError as error:
        raise ConfigError(f"--steps {steps}: {error}") from None
    loader = config.data.loader.model_copy(update={"num_workers": workers, "threads_per_worker": threads})
    config = with_absolute_paths(config)
    config = config.model_copy(update={"data": config.data.model_copy(update={"loader": loader})})
    chosen = config.stage_named(stage)
    storage = Storage(config.storage)
    with tempfile.TemporaryDirectory(prefix="mome-fingerprint-") as folder:
        scratch = apart(config, storage, folder, config.name)
        tokenizer = prepare(scratch, storage)
        digest = fingerprint(
            scratch, chosen, batch_groups(scratch, chosen), storage, tokenizer, range(first, last), world_size
        )
    return {"fingerprint": digest, "steps": [first, last], "stage": chosen.name}
