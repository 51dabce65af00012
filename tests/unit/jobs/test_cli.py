"""The command line: help, paths, results, errors; recipes, objectives, `mome fingerprint` and `mome plan`."""

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import ValidationError
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from jobs import cli, console
from jobs.cli import app
from jobs.cluster import for_ranks
from jobs.configs import fingerprint_of, list_recipes
from jobs.console import echo, local_file, notify, print_result
from jobs.plan import (
    EFFICIENT,
    SIZES,
    Target,
    as_json_object,
    as_text,
    plan_command,
    plan_run,
    recommend,
    run_curve,
    scaling_svg,
)  # fmt: skip
from jobs.results import evaluation_text
from jobs.scratch_runs import overfit, suggest_rate, try_learning_rates
from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import apply_override, validate, with_absolute_paths
from pipeline.config.schema import MODEL_SECTIONS, OBJECTIVES, OptimizerConfig
from pipeline.data.storage import Storage
from pipeline.planning.estimate import ACCELERATORS, NETWORKS, Assumptions
from pipeline.training.callbacks import Progress
from pipeline.training.engine import learning_rate
from pipeline.training.prepare import RUN_FILE, prepare
from tests.support.finished_run import config_of, contents, draw, write_run
from tests.support.short_run import short_config
from tests.support.tiny_model import tiny_config
from tests.support.trial import cells

ROOT = Path(__file__).resolve().parents[3]
SVG = "{http://www.w3.org/2000/svg}"
TARGET = Target(ACCELERATORS["h100"], NETWORKS["ib-400"], 2, Assumptions(price=2.5))
PLANNED = for_ranks(tiny_config(zero_stage=2), workers=2)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_parameter_has_a_help_text_without_markup_and_every_path_is_local(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Rich would drop `[word …]`."""
    texts, described, pending = {}, [], [("mome", get_command(app))]
    while pending:
        path, command = pending.pop()
        pending += [(f"{path} {name}", inner) for name, inner in getattr(command, "commands", {}).items()]
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
    monkeypatch.chdir(tmp_path)  # `pathlib` would create a folder named `s3:` for a URL
    for value in ("s3://bucket/page.html", "s3:/bucket/page.html", "${SCRATCH}/page.html", "file:/x"):
        for command in (["report", "run", "--out", value], ["train", value]):
            result = CliRunner().invoke(app, command)
            assert (result.exit_code, "Traceback" in result.output, os.listdir(tmp_path)) == (2, False, [])
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


def test_text_omits_missing_values_json_is_complete_and_neither_controls_the_terminal(capsys: Any) -> None:
    result = {"pairs": 3, "mlm": {"loss": 0.123456, "other": None}, "stages": ["a", "b"], "none": []}
    print_result(result, as_json=False)
    assert capsys.readouterr().out == "pairs     3\nmlm.loss  0.1235\nstages    a, b\n"
    print_result(result, as_json=True)
    assert capsys.readouterr().out == json.dumps(result) + "\n"
    hostile = {"caption": "\x1b]52;c;eA==\x07\x9b2J\u202e", "key": "\ud83d\x7f"}
    print_result(hostile, as_json=False)
    echo(hostile["caption"], err=True)
    notify(hostile["caption"])
    assert not set("".join(capsys.readouterr())) & set("\x1b\x07\x9b\u202e\x7f\ud83d")
    print_result(hostile, as_json=True)
    assert json.loads(capsys.readouterr().out) == hostile


def test_retrieval_is_a_table_in_percent(capsys: Any) -> None:
    recalls = {"r1": 0.5, "r5": 0.75, "r10": 1.0}
    retrieval = {"image_to_text": recalls | {"median_rank": 1.5}, "text_to_image": recalls, "chance": recalls}
    masked = {"accuracy": 0.25, "language_stage_text_only": 0.125, "masked_tokens": 1200}
    result = {"pairs": 8, "captions": 16, "source": "test", "retrieval": retrieval | {"by": "itc"}, "mlm": masked}
    print_result(result, as_json=False, text=evaluation_text)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["retrieval", "R@1", "R@5", "R@10", "median", "rank"]
    assert lines[1].split() == ["image", "to", "text", "50.0%", "75.0%", "100.0%", "1.5"]
    assert lines[4:] == [
        "",
        "retrieval  scored by itc",
        "mlm        accuracy 25.0%, language stage text only 12.5%, masked tokens 1,200",
        "source     test: 8 images, 16 captions",
    ]


def test_a_command_that_loads_for_long_says_so_before_anything_else(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_quick in (True, False):
        monkeypatch.setattr(console, "_has_output", threading.Event())
        console.announce_loading("report", seconds=30.0 if is_quick else 0.0)
        if is_quick:
            console.echo("done")
        for thread in (own for own in threading.enumerate() if own.name == "loading"):
            thread.join(timeout=10)
        assert capsys.readouterr().err == ("" if is_quick else "mome report: loading\n")


def test_phases_and_metrics_are_printed_without_silence(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.2)
    losses = {"itc": 2.0, "mlm": 0.5}

    def progress(step: int) -> Progress:
        return Progress("pairs", step, 9, step + 3, 12, 2.5, 40.0, 5.0, lr=1e-4, losses=losses)

    with console.RunDisplay("run") as display:
        display.phase("starting Ray")
        time.sleep(1.6)
        for step in (1, 2, 3):
            display.show(progress(step))
        time.sleep(1.6)
        display.show(progress(9))
    lines = [line.partition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert (lines[0], lines[1].startswith("run: starting Ray (")) == ("run: starting Ray", True)
    metrics = "  loss 2.5000 (itc 2, mlm 0.5)  lr 0.0001  40 samples/s  ETA 5.0 s"
    shown = [line for line in lines if "loss" in line]
    assert shown == [f"run: pairs {step}/9 (step {step + 3}/12){metrics}" for step in (1, 3, 9)]


def test_runs_of_a_folder_are_listed_and_their_metrics_printed(tmp_path: Path) -> None:
    shards = draw(tmp_path / "shards")
    (tmp_path / "runs" / "run").mkdir(parents=True)
    write_run(tmp_path / "runs" / "run", config_of(tmp_path / "runs", {"drawn": {"shards": shards}}, "drawn"), shards)
    files = (path for path in (tmp_path / "runs" / "run").rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    (row,) = json.loads(run("runs", "list", str(tmp_path / "runs"), "--sizes", "--json"))["runs"]
    state = {"run": "run", "status": "interrupted", "stage": "pairs", "step": 4, "steps": 4, "starts": 1, "bytes": size}
    state |= {"metric": "train/loss", "best": 2.0}
    assert {name: row[name] for name in state} == state
    header, line = run("runs", "list", str(tmp_path / "runs")).splitlines()
    assert (header.split()[:2], line.split()[:4]) == (["run", "status"], ["run", "interrupted", "pairs", "4/4"])
    for options in ((), ("--follow",)):  # which ends, because nothing has written to the run for a while
        assert "run: pairs 4/4  loss 2.0000  lr 0" in run("tail", str(tmp_path / "runs" / "run"), *options)
    heartbeat = {"at": time.time(), "seconds": {}, "restarts": 0, "ended": False}  # of another machine
    (tmp_path / "runs" / "run" / "time.json").write_text(json.dumps(heartbeat))
    assert run("runs", "list", str(tmp_path / "runs")).splitlines()[1].split()[1] == "running"
    for command in (["runs", "list", shards], ["tail", shards]):
        assert isinstance(CliRunner().invoke(app, command).exception, ConfigError)


def test_error_text_with_markup_is_printed_verbatim(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for message in (r"C:\[/bold]", "[red]", "a [link=http://x]b[/link]", r"\[x]"):
        monkeypatch.setattr(cli, "app", Mock(side_effect=RunFailed(message)))
        with pytest.raises(SystemExit):
            cli.main()
        assert capsys.readouterr().err == f"error: {message}\n"


def test_fingerprint_equals_that_of_the_run_and_changes_no_file(tmp_path: Path, monkeypatch: Any) -> None:
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
    assert run("config", "copy", "configs/demo.yaml") == run("config", "copy", "demo") == demo
    table = json.loads(run("objectives", "--json"))["objectives"]
    assert list(table) == list(OBJECTIVES)
    combinations = {(objective, kind, name) for objective, row in table.items() for kind in row for name in row[kind]}
    assert combinations == {(cell.objective, cell.kind, cell.source_type) for cell in cells()}
    lines = [line.split() for line in run("objectives").splitlines()]
    assert lines[0] == ["objective", *MODEL_SECTIONS]
    assert [line[0] for line in lines[1:]] == list(OBJECTIVES)
    assert ["nlvr2", *["statements"] * 2, *["·"] * 3] in lines


@pytest.fixture(scope="module")
def plans():
    return plan_run(PLANNED, TARGET)


def test_json_and_table_name_every_documented_key_zero_stage_and_assumption(plans):
    plan = as_json_object(plans, TARGET)
    assert {"parameters", "flops_per_step", "memory_bytes_per_gpu", "step_seconds", "hours", "cost"} <= plan.keys()
    assert {"states", "gradients", "activations", "total"} <= plan["memory_bytes_per_gpu"].keys()
    assert len(plan["stages"]) == 4
    assert plan["cost"] == pytest.approx(sum(stage["hours"] for stage in plan["stages"]) * 2 * 2.5)
    assert plan["hours"] == pytest.approx(16 * plan["step_seconds"] / 3600 / 0.97)  # four stages of four steps
    text = as_text(PLANNED, plans, TARGET, with_scaling=True)
    for expected in ("Stage vision:", "ZeRO 0", "ZeRO 3", "largest micro-batch", "mfu 0.35", "h100: 989 TFLOPS"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"(?<![\d.])0 (ms|s|h|GB)|e[-+]\d\d (ms|s|h|GB)", text), (
        "sizes and times have digits and a unit"
    )


def test_verdict_recommends_settings_that_fit_as_overrides_that_give_them(plans):
    first, advised = as_text(PLANNED, plans, TARGET).splitlines(), recommend(PLANNED, plans, TARGET)
    assert advised.fits
    assert re.match(r"1 GPU: .*, cost .*; 2 GPUs: .*scaling efficiency", " ".join(first[:2]))
    best = min(run.gpus * run.hours for run in run_curve(plans))
    assert advised.gpus * advised.hours <= best / EFFICIENT, "a tiny model is not spread over GPUs"
    overrides = [line.strip() for line in first if line.startswith("  ") and "=" in line]
    values = PLANNED.model_dump(mode="json")
    for override in overrides:
        apply_override(values, override)
    changed = validate(values, "the plan's overrides")
    assert changed.cluster.workers == advised.gpus
    assert {key: getattr(changed.engine, key) for key in advised.engine} == advised.engine
    (small,) = (replace(plan, chosen=replace(plan.chosen, fits=False, largest_micro_batch=0)) for plan in plans[:1])
    assert "Does not fit as configured: stage vision needs" in as_text(PLANNED, [small, *plans[1:]], TARGET)


def test_scaling_chart_is_complete_and_its_assumptions_are_legible(plans):
    root = ElementTree.fromstring(scaling_svg(plans, TARGET, "tiny & small"))
    texts = list(root.iter(f"{SVG}text"))
    assert {"tiny & small", "mfu 0.35"} <= {text.text for text in texts}
    assert sum(1 for _ in root.iter(f"{SVG}polyline")) == 4
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    lines = [text for text in texts if text.attrib["font-size"] == "10"]
    tops = [float(line.attrib["y"]) for line in lines]
    assert (len(lines) >= 10, tops[-1] < height) == (True, True)
    assert all(below - above >= 12 for above, below in itertools.pairwise(tops))
    assert all(float(line.attrib["x"]) + 6.5 * len(line.text or "") < width for line in lines)  # wide letters


def test_scaling_ends_where_a_rank_would_have_no_example(plans):
    for plan in plans:
        assert [point.gpus for point in plan.scaling] == [1, 2, 4, 8]  # of batches of 12
        first, last = plan.scaling[0], plan.scaling[-1]
        assert plan.efficiency(last) == pytest.approx(last.samples_per_second / (8 * first.samples_per_second))
        assert len({point.samples_per_second for point in plan.scaling}) == 4
    assert SIZES[-1] == 1024
    with pytest.raises(ConfigError, match="12 rows only"):
        plan_run(tiny_config(), replace(TARGET, gpus=16))
    with pytest.raises(ConfigError, match="--accelerator h1000: did you mean 'h100'"):
        plan_command(tiny_config(), "h1000", "ib-400", None, Assumptions(), None, None)


def test_suggested_rate_is_below_that_of_the_lowest_loss_and_none_where_no_rate_learns() -> None:
    """The loss falls until the rate is 1e-3 and then diverges, as on a ramp from 1e-6 to 1e-1."""
    optimizer = OptimizerConfig(lr=1e-1, min_lr=1e-6, warmup_steps=0, lr_schedule="exponential")
    rates = [learning_rate(step, 100, optimizer) for step in range(101)]
    assert (rates[0], rates[-1]) == pytest.approx((1e-6, 1e-1))
    assert rates[21] / rates[20] == pytest.approx(rates[81] / rates[80]), "by the same factor in every step"
    losses = [3.0 - 0.02 * step if rate < 1e-3 else 1.8 + 0.2 * (step - 60) for step, rate in enumerate(rates)]
    result = suggest_rate(list(zip(rates, losses, strict=True)))
    assert 1e-4 < result["lr"] <= 1e-3 < 2 * result["lowest_at"]
    assert suggest_rate([(rate, 3.0) for rate in rates])["lr"] is None
    for limits in ("1e-3", "1e-1:1e-6", "0:1", "a:b", "1e-6:inf"):
        with pytest.raises(ConfigError, match=f"--lr-range {limits}: expected two learning rates A:B"):
            try_learning_rates(tiny_config(), None, limits, 100)
    with pytest.raises(ConfigError, match="--overfit 1: expected two samples or more"):
        overfit(tiny_config(), None, 1, 100)
    with pytest.raises(ValidationError, match="exponential needs a min_lr above 0"):
        OptimizerConfig(lr_schedule="exponential")
