"""Configuration reference generated from the schema: Markdown for `configs/README.md`."""

import json
from typing import Any

from pipeline.config.schema import RunConfig

HEADER = """# Configuration reference

One YAML file configures one run. It states what differs from the defaults below; `KEY=VALUE` arguments of the commands
override it with the same dotted paths (`stages.vision.steps=100`). Unknown keys are errors. Keys marked ↻ may change
when a run is resumed; any other change is refused. The recipes in this folder state their command, cost and expected
result in their first lines.

This file is generated: `python -m pipeline.config.reference > configs/README.md`.
"""


def markdown() -> str:
    """Return the reference: one table per section, depth first, with every key, its type, default and meaning."""
    schema = RunConfig.model_json_schema()
    lines, tables = [HEADER], [("", schema)]
    while tables:
        path, section = tables.pop(0)
        lines += [f"## {path or 'The run'}", "", section["description"], "", "| key | type | default | meaning |"]
        lines.append("|---|---|---|---|")
        inner = []
        for name, key in section["properties"].items():
            # The sections that the value may be, and what follows the key in their paths.
            many, suffix = (key["items"], "[]") if "items" in key else (key.get("additionalProperties"), ".NAME")
            value, suffix = (many, suffix) if isinstance(many, dict) else (key, "")
            choices = value.get("anyOf", value.get("oneOf", [value]))
            sections = [schema["$defs"][choice["$ref"].rpartition("/")[2]] for choice in choices if "$ref" in choice]
            for choice in sections:
                kind = choice["properties"].get("kind", {}).get("const")
                place = f"{path}.{name}{suffix}".lstrip(".") + (f" (kind: {kind})" if kind else "")
                inner.append((place, choice))
            default = key.get("default", key.get("const"))
            shown = "" if default is None or sections else f"`{json.dumps(default, ensure_ascii=False)}`"
            if name in section.get("required", ()):
                shown = "required"
            mark = " ↻" if key.get("changeable") else ""
            cells = (f"`{name}`{mark}", _type(key), shown, key.get("description", ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        tables = inner + tables
        lines.append("")
    return "\n".join(lines)


def _type(key: dict[str, Any], plural: str = "") -> str:
    """Return the type of a key in words, with its bounds; `plural` is 's' for the type of several values."""
    choices = [choice for choice in key.get("anyOf", key.get("oneOf", [])) if choice.get("type") != "null"]
    if choices:
        return " or ".join(dict.fromkeys(_type(choice, plural) for choice in choices))
    if "$ref" in key:
        return f"section{plural}"
    if "const" in key or "enum" in key:
        return " or ".join(f"`{json.dumps(value)}`" for value in key.get("enum", [key.get("const")]))
    if key["type"] == "array":
        items = key.get("prefixItems")
        return f"list of {len(items)} numbers" if items else f"list of {_type(key['items'], 's')}"
    if key["type"] == "object":
        return f"mapping of names to {_type(key['additionalProperties'], 's')}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {key[name]:g}" for name, sign in signs.items() if name in key and key[name] < 1e9]
    return " ".join([f"{key['type']}{plural}", *([", ".join(limits)] if limits else [])])


if __name__ == "__main__":
    print(markdown(), end="")
