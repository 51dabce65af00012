"""The configuration reference and the JSON schema are complete and current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.reference import json_schema, markdown

README = Path(__file__).resolve().parents[3] / "configs" / "README.md"


def test_configs_readme_is_current() -> None:
    remedy = "run `python -m pipeline.config.reference > configs/README.md`"
    assert README.read_text(encoding="utf-8") == markdown(), remedy


def test_every_key_and_section_is_described() -> None:
    schema: dict[str, Any] = json_schema()
    for name, section in [("run", schema), *schema["$defs"].items()]:
        assert section.get("description"), name
        undescribed = [key for key, value in section["properties"].items() if not value.get("description")]
        assert set(undescribed) <= {"kind"}, name


def test_reference_has_a_row_for_every_key() -> None:
    text = markdown()
    for section in json_schema()["$defs"].values():
        assert all(f"\n| `{key}`" in text for key in section["properties"])
