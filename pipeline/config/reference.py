"""Configuration reference generated from the schema: Markdown for `configs/README.md`."""

from pipeline.config.keys import sections

HEADER = """# Configuration reference

One YAML file configures one run. It states what differs from the defaults below; `KEY=VALUE` arguments of the commands
override it with the same dotted paths (`stages.vision.steps=100`). Unknown keys are errors. Keys marked ↻ may change
when a run is resumed; any other change is refused. `mome config explain KEY` adds its place in the YAML and the
recipes that set it. The recipes in this folder state their command, cost and expected result in their first lines.

This file is generated: `python -m pipeline.config.reference > configs/README.md`.
"""


def markdown() -> str:
    """Return the reference: one table per section, depth first, with every key, its type, default and meaning."""
    lines = [HEADER]
    for section in sections():
        place = section.place + (f" (kind: {section.kind})" if section.kind else "")
        lines += [f"## {place or 'The run'}", "", section.description, "", "| key | type | default | meaning |"]
        lines.append("|---|---|---|---|")
        for key in section.keys:
            name = f"`{key.path.rpartition('.')[2]}`" + (" ↻" if key.is_changeable else "")
            default = "required" if key.is_required else f"`{key.default}`" if key.default else ""
            cells = (name, key.type, default, key.description)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
