"""`mome objectives`: the objectives each kind of model learns, and the source types it learns them from."""

from __future__ import annotations

from typing import Any, get_args

from jobs.console import aligned
from pipeline.config.schema import MODEL_SECTIONS, Objective, SourceType
from pipeline.models import skeleton


def source_types(objective: Objective, kind: str) -> list[SourceType]:
    """Return the source types from which a kind of model learns the objective; empty if it does not learn it."""
    model = skeleton(MODEL_SECTIONS[kind].model_validate({}))
    return [
        source_type for source_type in get_args(SourceType) if model.modules_for(objective, source_type) is not None
    ]


def objectives() -> dict[str, Any]:
    """Return the source types by objective and kind of model, as `mome objectives --json` prints them."""
    table = {
        objective: {kind: types for kind in MODEL_SECTIONS if (types := source_types(objective, kind))}
        for objective in get_args(Objective)
    }
    return {"objectives": table}


def as_text(result: dict[str, Any]) -> str:
    """Return the table, one objective per line and one kind of model per column."""
    header = ["objective", *MODEL_SECTIONS]
    rows = [
        [objective, *(", ".join(by_kind.get(kind, ["·"])) for kind in MODEL_SECTIONS)]
        for objective, by_kind in result["objectives"].items()
    ]
    return aligned([header, *rows])
