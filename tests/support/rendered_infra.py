"""The files of infra/ as users get them, rendered by `infra/render.py` with the example's settings."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
EXAMPLE = INFRA / "settings.example.env"


def load_script(path: Path) -> ModuleType:
    """Import a script of infra/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"infra_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = load_script(INFRA / "render.py")


def example_settings() -> dict[str, str]:
    return render.read_settings(EXAMPLE.read_text(), str(EXAMPLE))


def rendered(path: Path, **changes: str) -> list[dict[str, Any]]:
    """Return the documents of a rendered YAML file of infra/."""
    return list(yaml.safe_load_all(render.render(path, example_settings() | changes)))


def pins() -> dict[str, str]:
    """Return package -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
