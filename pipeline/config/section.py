"""What all sections of a config share: strict, frozen, and refusing keys they do not know."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0, le=2**53)]  # beyond, floats and tensors count wrongly or not at all
LONGEST = 1e9  # seconds, thirty years: of a timeout that is never to come; threads cannot wait much longer


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def changeable(default: Any, **bounds: Any) -> Any:
    """A key that may change when a run is resumed; the change is recorded, not refused."""
    return Field(default, json_schema_extra={"changeable": True}, **bounds)
