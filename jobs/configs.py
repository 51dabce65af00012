"""Where the recipes of `configs/` are: in the checkout, or installed from a wheel as `mome.configs` (see setup.py)."""

from __future__ import annotations

from pathlib import Path


def configs_folder() -> Path:
    """Return the folder that holds demo.yaml and the other recipes."""
    root = Path(__file__).resolve().parents[1]
    installed = root / "mome" / "configs"
    return installed if installed.is_dir() else root / "configs"
