#!/usr/bin/env python3
"""Fills in the variables of a file of this folder; what comes out is for `kubectl apply -f -` or `ray up`.

    python infra/render.py infra/kuberay/rayjob.yaml settings.env | kubectl apply -f -
    python infra/render.py infra/ray/aws.yaml settings.env CLUSTER_NAME=try > aws.yaml && ray up aws.yaml

Settings are lines NAME=value, as in `settings.example.env`, where every variable is explained; arguments NAME=value go
before them. A variable is written ${NAME}; a shell's own are written $NAME and stay. Unlike envsubst, this refuses what
has no value instead of leaving a gap. ${RAY_CLUSTER_SPEC} on a line of its own is `kuberay/cluster_spec.yaml`: a
RayJob's cluster and a RayCluster are described once.

Needs only Python's standard library.
"""

from __future__ import annotations

import re
import secrets
import sys
import textwrap
from pathlib import Path

VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)\}")
SPEC = re.compile(r"^( *)\$\{RAY_CLUSTER_SPEC\}$", flags=re.MULTILINE)
CLAIM = "RUN_CLAIM"  # a new claim per rendering, shared by the retries of one job (pipeline.training.ownership)
CLUSTER_SPEC = Path(__file__).parent / "kuberay" / "cluster_spec.yaml"


class SettingsError(ValueError):
    """Settings that do not say what a file needs."""


def read_settings(text: str, where: str) -> dict[str, str]:
    """NAME=value of every line that is neither empty nor a comment."""
    settings = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name.strip()):
            raise SettingsError(f"{where}, line {number}: expected NAME=value, got {line!r}")
        settings[name.strip()] = value.strip()
    return settings


def template(path: Path) -> str:
    """The file's text, with the description of the cluster where it asks for that."""
    text = path.read_text(encoding="utf-8")
    spec = CLUSTER_SPEC.read_text(encoding="utf-8").rstrip()
    return SPEC.sub(lambda found: textwrap.indent(spec, found[1]), text)


def variables(path: Path) -> set[str]:
    """Return the names of the settings that a file needs."""
    return set(VARIABLE.findall(template(path))) - {CLAIM}


def render(path: Path, settings: dict[str, str]) -> str:
    """The file with every variable filled in. Raises SettingsError, naming all that have no value."""
    missing = sorted(name for name in variables(path) if not settings.get(name))
    if missing:
        raise SettingsError(f"{path}: no value for {', '.join(missing)}; infra/settings.example.env explains each")
    values = {CLAIM: secrets.token_hex(8)} | settings
    return VARIABLE.sub(lambda found: values[found[1]], template(path))


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print("usage: python infra/render.py FILE SETTINGS [NAME=value …]", file=sys.stderr)
        return 2
    try:
        settings = read_settings(Path(arguments[1]).read_text(encoding="utf-8"), arguments[1])
        settings |= read_settings("\n".join(arguments[2:]), "arguments")
        sys.stdout.write(render(Path(arguments[0]), settings))
    except (OSError, SettingsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
