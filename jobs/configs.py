"""Configs of runs: the recipes of this package, the source types that models learn from, the data's fingerprint."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, get_args

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
        kind = values.get("model", {}).get("kind", "vlmo")
        recipes[path.relative_to(folder).with_suffix("").as_posix()] = f"{kind}: {stages}"
    return recipes


@cache
def source_types(kind: str) -> dict[str, list[str]]:
    """Return the source types from which a kind of model learns each objective; none if it does not learn it."""
    from pipeline.config.schema import MODEL_SECTIONS, SourceType, objective_names
    from pipeline.models import skeleton
    from pipeline.objectives import modules_for

    model = skeleton(MODEL_SECTIONS[kind].model_validate({}))
    return {
        objective: [name for name in get_args(SourceType) if modules_for(model, objective, name) is not None]
        for objective in objective_names()
    }


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
    chosen, storage = config.stage_named(stage), Storage(config.storage)
    with tempfile.TemporaryDirectory(prefix="mome-fingerprint-") as folder:
        scratch = apart(config, storage, folder, config.name)
        tokenizer, groups = prepare(scratch, storage), batch_groups(scratch, chosen)
        digest = fingerprint(scratch, chosen, groups, storage, tokenizer, range(first, last), world_size)
    return {"fingerprint": digest, "steps": [first, last], "stage": chosen.name}
