"""Configuration reference generated from the schema: JSON schema for editors, and Markdown for `configs/README.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pipeline.config.schema import RunConfig

HEADER = """# Configuration reference

One YAML file configures one run. It states what differs from the defaults below; `KEY=VALUE` arguments of the commands
override it with the same dotted paths (`stages.vision.steps=100`). Unknown keys are errors. Keys marked ↻ may change
when a run is resumed; any other change is refused. The recipes in this folder state their command, cost and expected
result in their first lines.

This file is generated: `python -m pipeline.config.reference > configs/README.md`.
"""


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a run's YAML file, for completion and validation in editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


def markdown() -> str:
    """Return the reference: one table per section with every key, its type, default and meaning."""
    schema = RunConfig.model_json_schema()
    definitions, lines = schema["$defs"], [HEADER]
    for path, section in {"": schema, **dict(_sections(schema, definitions, ""))}.items():
        lines += [f"## {path or 'The run'}", "", section["description"], "", "| key | type | default | meaning |"]
        lines.append("|---|---|---|---|")
        for name, key in section["properties"].items():
            value = key.get("default", key.get("const"))
            default = "" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"
            if name in section.get("required", ()):
                default = "required"
            elif _references(key)[0]:  # a section: its own table states the defaults
                default = ""
            mark = " ↻" if key.get("changeable") else ""
            cells = (f"`{name}`{mark}", _type(key, definitions), default, key.get("description", ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _sections(section: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the sections inside a section with their paths, depth first."""
    for name, key in section["properties"].items():
        names, suffix = _references(key)
        for reference in names:
            inner = definitions[reference]
            kind = inner["properties"].get("kind", {}).get("const")
            inner_path = f"{path}{name}{suffix}" + (f" (kind: {kind})" if kind else "")
            yield inner_path, inner
            yield from _sections(inner, definitions, f"{inner_path}.")


def _references(key: dict[str, Any]) -> tuple[list[str], str]:
    """Return the sections that a key's value may be, and what follows the key in their paths."""
    if "items" in key:
        return _references(key["items"])[0], "[]"
    if isinstance(key.get("additionalProperties"), dict):
        return _references(key["additionalProperties"])[0], ".NAME"
    choices = key.get("anyOf", key.get("oneOf", [key]))
    return [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice], ""


def _type(key: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the type of a key in words, with its bounds."""
    choices = [choice for choice in key.get("anyOf", key.get("oneOf", [])) if choice.get("type") != "null"]
    if choices:
        return " or ".join(dict.fromkeys(_type(choice, definitions) for choice in choices))
    if "$ref" in key:
        return "section"
    if "const" in key or "enum" in key:
        return " or ".join(f"`{json.dumps(value)}`" for value in key.get("enum", [key.get("const")]))
    if key["type"] == "array":
        items = key.get("prefixItems")
        return f"list of {len(items)} numbers" if items else f"list of {_plural(key['items'], definitions)}"
    if key["type"] == "object":
        return f"mapping of names to {_plural(key['additionalProperties'], definitions)}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {key[name]:g}" for name, sign in signs.items() if name in key and key[name] < 1e9]
    return " ".join([key["type"], *([", ".join(limits)] if limits else [])])


def _plural(key: dict[str, Any], definitions: dict[str, Any]) -> str:
    noun, space, bounds = _type(key, definitions).partition(" ")
    return f"{noun}s{space}{bounds}"


if __name__ == "__main__":
    print(markdown(), end="")
