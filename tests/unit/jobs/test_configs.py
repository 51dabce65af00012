"""Tools for configs: `mome train --dry-run`."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from jobs.cli import app
from jobs.describe_run import check_services, describe_run
from pipeline.data.storage import Storage
from pipeline.training.prepare import prepare
from pipeline.training.stages import Stage, build_stage_model
from tests.support.finished_run import contents
from tests.support.short_run import short_config


def test_dry_run_states_counts_and_every_problem_and_writes_nothing(tmp_path: Path) -> None:
    config, storage = short_config(str(tmp_path), tokenizer__size=40), Storage()
    new = describe_run(config)
    assert (new.state, new.steps, contents(tmp_path)) == ("new", 16, {})
    assert [(source.samples, source.note) for source in new.sources] == [(60, "generated when the run starts")] * 2
    tokenizer = prepare(config, storage)
    run = describe_run(config)
    check_services(run, config)
    alone = short_config(str(tmp_path), stages__1__start_from="random")
    assert (run.state, run.ranks, run.problems) == ("resumes from step 0 of 16", 2, [])
    assert run.vocabulary.startswith(f"{tokenizer.size} tokens of this run")
    for index, stage in enumerate(run.stages):
        weights = [*build_stage_model(Stage(alone, index), storage, tokenizer.size).parameters()]
        assert stage.parameters == sum(weight.numel() for weight in weights)
        assert stage.trained_parameters == sum(weight.numel() for weight in weights if weight.requires_grad)
        assert [*stage.epochs.values()] == [8 * 8 / 60]
    shard = next(tmp_path.glob("scenes/*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    files = contents(tmp_path)
    changed: dict[str, Any] = {"seed": 9, "cluster__gpus_per_worker": 64, "tracking__required": True}
    changed |= {"tracking__uri": "http://127.0.0.1:9", "stages__1__start_from": str(tmp_path / "absent")}
    config = short_config(str(tmp_path), tokenizer__size=40, **changed)
    run = describe_run(config)
    check_services(run, config)
    gpus = "2 ranks need 128 GPUs; this machine has"
    expected = ["was truncated", "seed: was 7, now 9", "absent", "127.0.0.1:9", gpus]
    assert [text for text in expected if not any(text in problem for problem in run.problems)] == []
    assert contents(tmp_path) == files


def test_dry_run_command_fails_before_a_run_that_cannot_start(tmp_path: Path) -> None:
    arguments = ["train", "configs/demo.yaml", f"output={tmp_path}", "--dry-run", "--json"]
    done = CliRunner().invoke(app, [*arguments, "sources.pictures.shards=absent"])
    result = json.loads(done.stdout)
    assert (done.exit_code, len(result["problems"]), [*tmp_path.iterdir()]) == (2, 1, [])
    assert [stage["objectives"] for stage in result["stages"]] == [["mim"], ["mlm"], ["itc", "itm", "mlm"]]
