"""`mome config`: start a config, print one with all its defaults, explain a key, list and copy recipes."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from jobs.console import Config, JsonOption, Overrides, echo, local_file, notify, print_result
from pipeline.config.durable import atomic_write
from pipeline.config.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, help="Start, show and explain configs; list and copy recipes; print the schema."
)


KIND_HELP = "Model: vlmo, vilt, vit, imagebert or dual_encoder."
SIZE_HELP = "tiny, small, base or large (default: tiny without GPUs, small below 4, else base)."


@app.command()
def new(
    out: Annotated[Path | None, Argument(parser=local_file, help="New file (default: NAME.yaml).")] = None,
    data: Annotated[
        str | None, Option(help="Folder of shards to train on (path or URL); asked for if left out.")
    ] = None,
    kind: Annotated[str | None, Option(help=KIND_HELP)] = None,
    gpus: Annotated[int | None, Option(min=0, help="Number of GPUs; 0: CPU (default: those of this machine).")] = None,
    image_data: Annotated[str | None, Option(help="Shards of images for a vision stage before the pairs.")] = None,
    text_data: Annotated[str | None, Option(help="Shards of texts for a language stage before the pairs.")] = None,
    test_data: Annotated[str | None, Option(help="Held-out shards, to evaluate at the end.")] = None,
    name: Annotated[str | None, Option(help="Name of the run (default: that of OUT, else the kind).")] = None,
    output: Annotated[str, Option(help="Folder or URL for the run's folder.")] = "runs",
    vocabulary: Annotated[str | None, Option(help="WordPiece vocabulary (default: trained from the captions).")] = None,
    start_from: Annotated[str | None, Option(help="Weights to start from: a run, a stage, or imported ones.")] = None,
    size: Annotated[str | None, Option(help=SIZE_HELP)] = None,
    epochs: Annotated[float, Option(min=0.01, help="Passes over the data of each stage.")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Write a commented config that trains as it is, sized for data and GPUs. Without --data, ask on a terminal."""
    if gpus is None:
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if data is None:
        if not sys.stdin.isatty():
            raise ConfigError("--data: expected a folder of shards (path or URL), as `mome shards build` writes them")
        data = str(typer.prompt("Folder of shards to train on (path or URL)", err=True))
        kind = kind or str(typer.prompt("Kind of model", default="vlmo", err=True))
        gpus = int(typer.prompt("Number of GPUs (0: CPU)", default=gpus, type=int, err=True))
        test_data = test_data or str(typer.prompt("Held-out shards (empty: none)", default="", err=True)) or None
    from jobs.new_config import Choice, new_config

    if name is None and out is not None:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", out.stem).strip("-._") or None
    more = {"image_data": image_data, "text_data": text_data, "test_data": test_data, "vocabulary": vocabulary}
    choice = Choice(data, kind or "vlmo", gpus, name, output, **more, start_from=start_from, size=size, epochs=epochs)
    text, config, notes = new_config(choice)
    path = out or Path(f"{config.name}.yaml")
    write_new(path, text)
    for note in notes:
        notify(note, "yellow")
    result = {"config": str(path), "steps": config.total_steps, "notes": notes}
    train = f"mome train {shlex.quote(str(path))}"
    print_result(result, as_json, f"{train} --dry-run   # what it will do\n{train}")


@app.command("list")
def list_configs(as_json: JsonOption = False) -> None:
    """List the recipes with their kind of model and stages."""
    from jobs.configs import list_recipes

    print_result(list_recipes(), as_json)


@app.command()
def show(
    config: Config,
    overrides: Overrides = None,
    diff: Annotated[bool, Option("--diff", help="Only the keys that differ from the defaults.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print CONFIG with every key, and a comment where a value differs from its default."""
    from jobs.config_tools import resolved_yaml
    from pipeline.config.load import load_config
    from pipeline.config.redaction import redact_values

    resolved = load_config(config, overrides or [])
    if as_json:
        print_result(redact_values(resolved.model_dump(mode="json", exclude_defaults=diff)), as_json)
    else:
        echo(resolved_yaml(resolved, diff), newline=False)


@app.command()
def copy(
    recipe: Annotated[str, Argument(help="Name of a recipe: demo or finetune/vilt_b32_vqa.")],
    out: Annotated[Path | None, Argument(parser=local_file, help="New file (default: print the recipe).")] = None,
) -> None:
    """Copy a recipe with its comments, to start your own config from it."""
    from jobs.configs import list_recipes
    from pipeline.config.load import RECIPES, find_config

    source, _ = find_config(recipe)
    if not source.resolve().is_relative_to(RECIPES):
        raise ConfigError(f"{recipe}: not a recipe; expected one of {', '.join(list_recipes())}")
    text = source.read_text(encoding="utf-8")
    if out is None:
        echo(text, newline=False)
    else:
        write_new(out, text)


@app.command()
def explain(
    key: Annotated[str, Argument(help="Key: lr, batch_size or stages.NAME.optimizer.lr.")],
    as_json: JsonOption = False,
) -> None:
    """Explain a key of configs: meaning, type, default, place in the YAML, values in recipes."""
    from jobs.config_tools import explain_key

    result, text = explain_key(key)
    print_result(result, as_json, text)


@app.command()
def schema() -> None:
    """Print the JSON schema of a config, for validation and completion in editors."""
    from pipeline.config.keys import json_schema

    echo(json.dumps(json_schema(), indent=2))


def write_new(path: Path, text: str) -> None:
    """Write a new file and say so. Raises ConfigError if it exists or cannot be written."""
    try:
        with atomic_write(path, create=True) as file:
            file.write(text.encode())
    except FileExistsError as error:
        raise ConfigError(f"{path} exists already, and is not overwritten; give another name") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); give another name") from error
    notify(f"Wrote {path}")
