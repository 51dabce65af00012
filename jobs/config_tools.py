"""`mome config show` and `mome config explain`: a config with all its defaults, and facts about a key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from textwrap import indent
from typing import Any

import yaml

from jobs.console import aligned
from pipeline.config.errors import ConfigError
from pipeline.config.keys import find_keys, path_pattern, paths, sections
from pipeline.config.load import RECIPES, flatten, parse_yaml
from pipeline.config.redaction import redact_values
from pipeline.config.schema import RunConfig, Section

MAX_RECIPES = 6  # whose values of a key are shown


def resolved_yaml(config: RunConfig, only_changed: bool = False) -> str:
    """Return the config as YAML with every key, or those that differ from the defaults, which a comment then states.

    Both forms load as the same config. Secrets are references; passwords in URLs are redacted.
    """
    return "\n".join([*section_lines(config, only_changed), ""])


def section_lines(section: Section, only_changed: bool) -> Iterator[str]:
    """Yield the lines of a section's keys, not indented."""
    for name, key in type(section).model_fields.items():
        value, default = getattr(section, name), key.default
        differs = key.is_required() or value != default
        # The section of another kind of model has its own kind as default, and the run's default is VLMo.
        if name == "kind":
            default = RunConfig.model_fields["model"].default.kind
            differs = value != default
        if only_changed and not differs:
            continue
        inner = None
        if isinstance(value, Section):
            inner = [*section_lines(value, only_changed)]
        elif isinstance(value, dict) and any(isinstance(item, Section) for item in value.values()):
            inner = []
            for own, item in value.items():
                lines = [*section_lines(item, only_changed)]
                inner += [f"{_flow(own)}:", *(f"  {line}" for line in lines)] if lines else [f"{_flow(own)}: {{}}"]
        elif isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
            items = [[*section_lines(item, only_changed)] for item in value]
            inner = [f"{'  ' if number else '- '}{line}" for lines in items for number, line in enumerate(lines)]
        comment = "  # required" if key.is_required() else ""
        if differs and not key.is_required() and not isinstance(default, Section):
            comment = f"  # default: {_flow(default)}"
        if inner is None:
            plain = section.model_dump(mode="json", include={name})[name]
            yield f"{name}: {_flow(plain)}{comment}"
        else:
            yield f"{name}:{comment}" if inner else f"{name}: {{}}{comment}"
            yield from (f"  {line}" for line in inner)


def _flow(value: Any) -> str:
    """Return a value as YAML on one line that reads back as the same value in YAML 1.2."""
    value = redact_values([*value] if isinstance(value, tuple) else value)
    text = str(yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False))
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if "\n" not in text and parse_yaml(text, "value") == value else json.dumps(value, ensure_ascii=False)


def explain_key(name: str) -> tuple[dict[str, Any], str]:
    """Return what a key, or every key of that name, means, as JSON and as text. Raises ConfigError for none."""
    described = [describe_key(path) for path in find_keys(name)]
    if not described:
        raise ConfigError(f"no key '{name}', and none is similar; `mome config explain stages` lists a section's keys")
    if len(described) > 1:
        hint = "Explain one of them by its path, such as"
        return {"keys": described}, f"{_table(described)}\n\n{hint} `mome config explain {described[0]['path']}`."
    (key,) = described
    facts = [["type", key["type"]], ["default", key["default"]]] if not key["keys"] else []
    facts.append(["resume", "may change when a run is resumed" if key["changeable"] else "fixed for the whole run"])
    if recipes := key["recipes"]:
        shown = [f"{own} {', '.join(values)}" for own, values in list(recipes.items())[:MAX_RECIPES]]
        facts.append(["recipes", "; ".join([*shown, *["…"] * (len(recipes) > len(shown))])])
    pad, place = "", []
    for number, part in enumerate(parts := key["path"].split(".")):
        if part == "NAME" and parts[number - 1] == "stages":
            place.append(f"{pad}- name: NAME")
        else:
            place.append(f"{pad}{part}:" + (" …" if part is parts[-1] else ""))
        pad += "  "
    title = f"{key['path']}: {key['description']}"
    facts.append(["override", f"{key['path']}=VALUE"])
    text = f"{title}\n\n{indent(aligned(facts), '  ')}\n\n{indent(chr(10).join(place), '  ')}"
    return {"keys": described}, text + (f"\n\n{indent(_table(key['keys']), '  ')}" if key["keys"] else "")


def describe_key(path: str, with_details: bool = True) -> dict[str, Any]:
    """Return the facts of a key. Where kinds of model differ in its default or meaning, each is followed by its kinds.

    With details, also the values in recipes, and for a section the facts of its keys.
    """
    variants = [(section.kind, key) for section in sections() for key in section.keys if key.path == path]

    def merged(attribute: str) -> str:
        """Return the values of an attribute, with the kinds that have each if there are several."""
        kinds: dict[str, list[str]] = {}
        for kind, key in variants:
            kinds.setdefault(getattr(key, attribute), []).append(kind)
        named = (f"{value or 'none'} ({', '.join(names)})" for value, names in kinds.items())
        return "; ".join(named) if len(kinds) > 1 else next(iter(kinds))

    key = variants[0][1]
    default = "required" if key.is_required else merged("default") or "none"
    facts: dict[str, Any] = {"path": path, "type": merged("type"), "default": default}
    facts |= {"description": merged("description"), "changeable": key.is_changeable, "kinds": paths()[path]}
    if not with_details:
        return facts
    values, pattern = dict[str, list[str]](), re.compile(path_pattern(path))
    for name, recipe in recipe_keys().items():
        if own := [_flow(value) for place, value in recipe.items() if pattern.fullmatch(place)]:
            values[name] = list(dict.fromkeys(own))
    inside = rf"{re.escape(path)}\.(NAME\.)?[^.]+"
    keys = [describe_key(other, with_details=False) for other in paths() if re.fullmatch(inside, other)]
    return facts | {"recipes": values, "keys": keys}


@cache
def recipe_keys() -> dict[str, dict[str, Any]]:
    """Return the keys that each recipe sets, flattened, by the recipe's name."""
    files = {file.relative_to(RECIPES).with_suffix("").as_posix(): file for file in sorted(RECIPES.rglob("*.yaml"))}
    return {name: flatten(parse_yaml(file.read_bytes(), name)) for name, file in files.items()}


def _table(keys: list[dict[str, Any]]) -> str:
    """Return a line per key: its path, default and description."""
    return aligned([[key["path"], key["default"], key["description"]] for key in keys])
