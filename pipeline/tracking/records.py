"""Records of a journal: one JSON line each, checked when it is read, because a journal may come from anybody.

A record is {"kind": …, "at": milliseconds, "stage": index or null, …}. Kinds: campaign (first record of every
session), stage, metrics, rewind (a stage went back to a step, whose later points are void), tag, artifact, model and
model_gone (weights that are kept, and are no longer), stage_end, campaign_end. Numbers keep every bit; those that
JSON does not know are strings ("nan", "inf", "-inf").
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

Record = dict[str, Any]

_FILE = re.compile(r"[0-9a-f]{16}/[^/\0]{1,255}")
_LONGEST_NAME = 1000
RUN_ID = "[0-9A-Za-z_.-]{1,64}"


def is_file_name(name: str) -> bool:
    """Return True for a name under which a journal keeps an artifact: '<16 hex digits>/<name>'.

    Every file name that is read from a record passes here before it becomes a path: a journal's author must not
    choose what is written, or read, elsewhere on this machine.
    """
    return (
        _FILE.fullmatch(name) is not None
        and posixpath.basename(name) not in (".", "..")
        and len(posixpath.basename(name).encode(errors="replace")) <= 255  # as file systems count
    )


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("an artifact's file must be '<16 hex digits>/<name>'")
    return name


def check_artifact_name(name: str) -> str:
    """Return the name, of which MLflow makes a path below its own folder of artifacts. Raises ValueError."""
    if "\0" in name or "\\" in name or not 0 < len(name) <= _LONGEST_NAME:
        raise ValueError("an artifact's name must be a relative path")
    if name.startswith("/") or name != posixpath.normpath(name) or name.split("/")[0] in (".", ".."):
        raise ValueError("an artifact's name must be a relative path without '..'")
    return name


_Count = Annotated[int, Field(ge=0, le=2**53)]
_Step = Annotated[int, Field(ge=-(2**53), le=2**53)]
_Stage = Annotated[int, Field(ge=0, lt=10_000)]
_Number = float | Literal["nan", "inf", "-inf"]
_Texts = dict[str, str]
_Status = Literal["FINISHED", "FAILED", "KILLED"]


class _Base(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    at: _Count


class _Dataset(TypedDict):
    name: str
    source: str
    digest: str
    context: str


class _Point(TypedDict):
    stage: _Stage | None
    key: str
    value: _Number
    at: _Count


class _Campaign(_Base):
    kind: Literal["campaign"]
    stage: _Stage | None
    run: Annotated[str, Field(pattern=f"^{RUN_ID}$")]  # part of a search in MLflow
    name: NotRequired[str]
    uri: NotRequired[str]
    experiment: NotRequired[str]
    params: _Texts
    tags: _Texts
    datasets: list[_Dataset]
    server_has_more: NotRequired[bool]


class _StageBegun(_Base):
    kind: Literal["stage"]
    stage: _Stage
    name: str
    params: _Texts
    tags: _Texts
    datasets: list[_Dataset]


class _Metrics(_Base):
    kind: Literal["metrics"]
    stage: _Stage | None
    step: _Step
    values: dict[str, _Number]


class _Rewind(_Base):
    kind: Literal["rewind"]
    stage: _Stage
    step: _Step


class _Tag(_Base):
    kind: Literal["tag"]
    stage: _Stage | None
    key: str
    value: str


class _Artifact(_Base):
    kind: Literal["artifact"]
    stage: _Stage | None
    name: Annotated[str, AfterValidator(check_artifact_name)]
    file: Annotated[str, AfterValidator(_file_name)]


class _Model(_Base):
    kind: Literal["model"]
    stage: _Stage
    step: _Step
    url: str
    role: str
    points: list[_Point]


class _ModelGone(_Base):
    kind: Literal["model_gone"]
    stage: _Stage | None
    url: str


class _End(_Base):
    kind: Literal["stage_end", "campaign_end"]
    stage: _Stage | None
    status: _Status


_ANY = _Campaign | _StageBegun | _Metrics | _Rewind | _Tag | _Artifact | _Model | _ModelGone | _End
_READ: TypeAdapter[Any] = TypeAdapter(Annotated[_ANY, Field(discriminator="kind")])


def encode_number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def encode(record: Record) -> bytes:
    """Return the line of a record. Half of a surrogate pair, which is no text, becomes a question mark."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return line.encode(errors="replace") + b"\n"


def decode(line: bytes) -> Record:
    """Return the record of a line. Raises ValueError, in one line, for anything that is not a record."""
    try:
        record: Record = _READ.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    return record
