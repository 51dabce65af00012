"""The command line: fast and complete help, local paths, plain results, and errors that are printed verbatim.

Recipes, the table of objectives, and `mome fingerprint`, which does not modify the run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from jobs import cli
from jobs.cli import app
from jobs.configs import fingerprint_of, list_recipes
from jobs.console import echo, local_file, notify, print_result
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import with_absolute_paths
from pipeline.config.schema import MODEL_SECTIONS, OBJECTIVES
from pipeline.data.storage import Storage
from pipeline.training.prepare import RUN_FILE, prepare
from tests.support.finished_run import contents
from tests.support.short_run import short_config
from tests.support.trial import cells

ROOT = Path(__file__).resolve().parents[3]


def commands() -> Iterator[tuple[str, Any]]:
    pending = [("mome", get_command(app))]
    while pending:
        path, command = pending.pop()
        pending += [(f"{path} {name}", inner) for name, inner in getattr(command, "commands", {}).items()]
        yield path, command


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_parameter_has_a_help_text_without_markup_and_every_path_is_local() -> None:
    """Rich would drop `[word …]`."""
    texts, described = {}, []
    for path, command in commands():
        texts[path] = command.help
        texts |= {f"{path} {parameter.name}": getattr(parameter, "help", None) for parameter in command.params}
        described += [p.type_descriptor for p in command.params if hasattr(p, "type_descriptor")]
    assert len(texts) > 100
    assert [path for path, text in texts.items() if not text] == []
    wrong = [path for path, text in texts.items() if Text.from_markup(text).plain != text.replace("\\[", "[")]
    assert not wrong, "write \\[ for a bracket"
    paths = [parameter.parameter_info for parameter in described if "Path" in str(parameter.annotation)]
    assert len(paths) > 15
    assert all(info.parser is local_file for info in paths)
    assert [local_file(p) for p in ("~/x", "file:///a/b", "a/b")] == [Path.home() / "x", Path("/a/b"), Path("a/b")]
    assert run("--version").startswith("mome ")


def test_help_and_submitting_import_no_heavy_library() -> None:
    heavy = ("torch", "ray", "mlflow", "deepspeed", "transformers", "numpy", "yaml", "botocore", "pyarrow")
    program = (
        "import sys; from jobs.cli import app\n"
        "for command in ([], ['shards'], ['bench'], ['jobs'], ['train']):\n"
        "    app([*command, '--help'], standalone_mode=False)\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "import jobs.tracking, jobs.submit\n"  # for `mome sync`, and `mome submit` on a laptop without a GPU
        "print(loaded, [name for name in ('torch', 'deepspeed', 'transformers', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[] []"


@pytest.mark.parametrize("command", [["report", "run", "--out"], ["train"]])
def test_url_is_rejected_for_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """`pathlib` would create a folder named `s3:` for a URL."""
    monkeypatch.chdir(tmp_path)
    for value in ("s3://bucket/page.html", "s3:/bucket/page.html", "${SCRATCH}/page.html", "file:/x"):
        result = CliRunner().invoke(app, [*command, value])
        assert (result.exit_code, "Traceback" in result.output, os.listdir(tmp_path)) == (2, False, [])


def test_text_omits_missing_values_json_is_complete_and_neither_controls_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = {"pairs": 3, "mlm": {"accuracy": 0.123456, "accuracy_text_only": None}, "stages": ["a", "b"]}
    print_result(result, as_json=False)
    assert capsys.readouterr().out == "pairs         3\nmlm.accuracy  0.1235\nstages        a, b\n"
    print_result(result, as_json=True)
    assert capsys.readouterr().out == json.dumps(result) + "\n"
    hostile = {"caption": "\x1b]52;c;eA==\x07\x9b2J\u202e", "key": "\ud83d\x7f"}
    print_result(hostile, as_json=False)
    echo(hostile["caption"], err=True)
    notify(hostile["caption"])
    assert not set("".join(capsys.readouterr())) & set("\x1b\x07\x9b\u202e\x7f\ud83d")
    print_result(hostile, as_json=True)
    assert json.loads(capsys.readouterr().out) == hostile


def test_error_text_with_markup_is_printed_verbatim(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for message in (r"C:\[/bold]", "[red]", "a [link=http://x]b[/link]", r"\[x]"):
        monkeypatch.setattr(cli, "app", Mock(side_effect=RunFailed(message)))
        with pytest.raises(SystemExit):
            cli.main()
        assert capsys.readouterr().err == f"error: {message}\n"


def test_fingerprint_equals_that_of_the_run_and_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short_config(str(tmp_path), tokenizer__size=40)
    before = fingerprint_of(config, "pairs", "0:2", 1, 0, 1)
    assert not (tmp_path / "run").exists(), "the name of the run was claimed"
    prepare(config, Storage())
    files = contents(tmp_path)
    changed = short_config(str(tmp_path), tokenizer__size=40, data__loader__prefetch_batches=5)
    assert fingerprint_of(config, "pairs", "0:2", 2, 0, 2) == fingerprint_of(changed, "pairs", "0:2", 1, 1, 1) == before
    assert contents(tmp_path) == files
    other = short_config(str(tmp_path / "other"), tokenizer__size=40, seed=9)
    assert fingerprint_of(other, "pairs", "0:2", 1, 0, 1) != before
    # It rejects what training rejects, and accepts relative paths.
    with pytest.raises(ConfigError, match="seed: was 7, now 9"):
        fingerprint_of(config.model_copy(update={"seed": 9}), None, "0:1", 1, 0, 1)
    (tmp_path / "run" / RUN_FILE).write_text('{"name": null}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not a config of this version"):
        fingerprint_of(config, None, "0:1", 1, 0, 1)
    monkeypatch.chdir(tmp_path)
    tokenizer = prepare(with_absolute_paths(short_config("runs")), Storage())
    Storage().write("vocab.txt", tokenizer.vocabulary_file)
    config = short_config("runs", name="other", tokenizer__vocabulary="vocab.txt")
    prepare(with_absolute_paths(config), Storage())
    assert fingerprint_of(config, "pairs", "0:1", 1, 0, 1)["steps"] == [0, 1]


def test_recipes_and_objectives_are_listed_and_the_schema_describes_them() -> None:
    recipes = json.loads(run("config", "list", "--json"))
    assert recipes["demo"] == "vlmo: vision → language → vision_language"
    assert "finetune/vilt_b32_vqa" in recipes
    assert recipes == list_recipes()
    demo = (ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8")
    assert run("config", "show", "configs/demo.yaml") == run("config", "show", "demo") == demo
    unknown = CliRunner().invoke(app, ["config", "show", "dmeo"]).exception
    assert isinstance(unknown, ConfigError)
    assert str(unknown).startswith("no recipe 'dmeo'; expected one of demo, ")
    assert {"name", "model", "sources", "stages"} <= json.loads(run("config", "schema"))["properties"].keys()
    table = json.loads(run("objectives", "--json"))["objectives"]
    assert list(table) == list(OBJECTIVES)
    combinations = {(objective, kind, name) for objective, row in table.items() for kind in row for name in row[kind]}
    assert combinations == {(cell.objective, cell.kind, cell.source_type) for cell in cells()}
    lines = [line.split() for line in run("objectives").splitlines()]
    assert lines[0] == ["objective", *MODEL_SECTIONS]
    assert [line[0] for line in lines[1:]] == list(OBJECTIVES)
    assert ["nlvr2", *["statements"] * 2, *["·"] * 3] in lines
