"""What one check of `mome doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["works", "fails", "not asked"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, what was found, and where it fails how to mend it."""

    name: str
    status: Status
    found: str
    mend: str = ""


def works(name: str, found: str) -> Finding:
    return Finding(name, "works", found)


def fails(name: str, found: str, mend: str) -> Finding:
    """Something that a run here, or the run of the config that was given, needs."""
    return Finding(name, "fails", found, mend)


def not_asked(name: str, found: str) -> Finding:
    """Nothing here needs it, or nothing says where it is."""
    return Finding(name, "not asked", found)


def gigabytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
