"""`mome train --dry-run`, and `mome config new | show | explain | copy | schema`."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.config_tools import explain_key, resolved_yaml
from jobs.describe_run import check_services, describe_run
from jobs.new_config import OBJECTIVES, SIZES, Choice, new_config
from pipeline.config.errors import ConfigError
from pipeline.config.keys import json_schema, paths
from pipeline.config.load import RECIPES, load_config, parse_yaml, validate
from pipeline.data.building.scenes import build_synthetic
from pipeline.data.storage import Storage
from pipeline.training.prepare import prepare
from pipeline.training.stages import Stage, build_stage_model
from tests.support.fine_tuning_data import write_set
from tests.support.finished_run import contents, untrained_weights
from tests.support.short_run import short_config
from tests.support.train_process import run_module


def test_dry_run_states_counts_and_every_problem_and_writes_nothing(tmp_path: Path) -> None:
    config, storage = short_config(str(tmp_path), tokenizer__size=40), Storage()
    new = describe_run(config)
    assert (new.state, new.steps, contents(tmp_path)) == ("new", 16, {})
    assert [(source.samples, source.note) for source in new.sources] == [(60, "generated when the run starts")] * 2
    tokenizer = prepare(config, storage)
    run = describe_run(config)
    check_services(run, config)
    alone = short_config(str(tmp_path), stages__1__start_from="random")
    assert (run.state, run.ranks, run.problems) == ("new", 2, [])
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
    arguments = ["train", "demo", f"output={tmp_path}", "--dry-run", "--json"]
    done = CliRunner().invoke(app, [*arguments, "sources.pictures.shards=absent"])
    result = json.loads(done.stdout)
    assert (done.exit_code, len(result["problems"]), [*tmp_path.iterdir()]) == (2, 1, [])
    assert [stage["objectives"] for stage in result["stages"]] == [["mim"], ["mlm"], ["itc", "itm", "mlm"]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: Any) -> dict[str, str]:
    """Return a folder of indexed shards of each source type that a new config may train on, without regions."""
    folder = tmp_path_factory.mktemp("shards")
    build_synthetic(Storage(), short_config(str(folder)).sources)
    own = {name: write_set(folder, name, 40) for name in ("questions", "statements", "labelled")}
    return own | dict.fromkeys(("pairs", "images"), f"{folder}/scenes")


def test_new_config_of_every_kind_loads_and_would_train(shards: dict[str, str], tmp_path: Path) -> None:
    for kind, types in OBJECTIVES.items():
        for source_type in types:
            data = shards.get(source_type, "s3://bucket/not-reachable")
            test = None if source_type in ("images", "regions") else data
            for gpus, size in ((0, None), (3, "base"), (64, "large")):
                stages = {"image_data": data, "text_data": data} if (kind, source_type) == ("vlmo", "pairs") else {}
                choice = Choice(data, kind, gpus, output=str(tmp_path), size=size, test_data=test, **stages)
                text, config, notes = new_config(choice)
                assert (config.model.kind, config.cluster.workers) == (kind, max(1, gpus))
                assert config.stages[-1].global_batch_size >= config.cluster.workers
                if data.startswith("s3://"):
                    assert "its type and size are assumed" in notes[0]
                    continue
                assert config.sources["train"].type == source_type
                if gpus:
                    continue
                run = describe_run(config)
                assert (run.problems, notes) == ([], [])
                assert all(
                    9 < epochs < 11 or stage.steps == 1 for stage in run.stages for epochs in stage.epochs.values()
                )
                assert all(f"\n  - name: {stage.name}" in text for stage in config.stages)
    with pytest.raises(ConfigError, match=r"vilt trains on pairs .*, and the first sample, 'drawn00000', has cls, jpg"):
        new_config(Choice(shards["labelled"], "vilt"))
    with pytest.raises(ConfigError, match="--size huge: expected one of tiny, small"):
        new_config(Choice(shards["pairs"], size="huge"))
    assert len(SIZES) == 4


def test_new_config_command_writes_once_and_says_what_is_missing(shards: dict[str, str], tmp_path: Path) -> None:
    out, options = str(tmp_path / "new.yaml"), ["--data", shards["pairs"], "--gpus", "0", "--epochs", "3"]
    done = CliRunner().invoke(app, ["config", "new", out, *options, "--json"])
    assert json.loads(done.stdout) == {"config": out, "steps": load_config(out).total_steps, "notes": []}
    assert load_config(out).name == "new", "of the file"
    for arguments, expected in (
        ([out, *options], "exists already, and is not overwritten"),
        ([], "--data: expected a"),
    ):
        error = CliRunner().invoke(app, ["config", "new", *arguments]).exception
        assert isinstance(error, ConfigError)
        assert expected in str(error)


def test_new_config_takes_model_and_vocabulary_from_the_weights_to_start_from(tmp_path: Path) -> None:
    trained, weights = untrained_weights(tmp_path)
    data = trained.sources["scenes"].shards
    choice = Choice(data, image_data=data, start_from=weights, name="new", output=str(tmp_path))
    config = new_config(choice)[1]
    assert (config.model, config.tokenizer.vocabulary) == (trained.model, f"{weights}/vocab.txt")
    assert [(stage.name, stage.start_from) for stage in config.stages] == [("vision", weights), ("pairs", "previous")]
    assert describe_run(config).problems == []
    other = config.model_copy(update={"tokenizer": trained.tokenizer})
    assert "set tokenizer.vocabulary to " in describe_run(other).problems[0]
    with pytest.raises(ConfigError, match="its weights are of kind vlmo; give --kind vlmo"):
        new_config(Choice(data, "vilt", start_from=weights))


@pytest.mark.slow
def test_new_config_trains_as_it_is(shards: dict[str, str], tmp_path: Path) -> None:
    out, data = str(tmp_path / "new.yaml"), shards["pairs"]
    options = ["--data", data, "--image-data", data, "--text-data", data, "--gpus", "0", "--output", str(tmp_path)]
    assert CliRunner().invoke(app, ["config", "new", out, *options]).exit_code == 0
    short = [f"stages.{name}.steps=2" for name in ("vision", "language", "pairs")]
    done = run_module("pipeline.training", out, *short)
    assert done.returncode == 0, done.stderr
    assert describe_run(load_config(out, short)).state == "finished: every stage is trained"


def test_resolved_configs_load_as_the_same_config_and_mark_what_differs() -> None:
    for path in sorted(RECIPES.rglob("*.yaml"))[::2]:
        config = load_config(path)
        whole, diff = resolved_yaml(config), resolved_yaml(config, only_changed=True)
        assert validate(parse_yaml(whole, "show"), "show") == validate(parse_yaml(diff, "diff"), "diff") == config
        assert all("  # " in line or line.rstrip().endswith((":", "{}")) for line in diff.splitlines())
        assert set(diff.splitlines()) <= set(whole.splitlines()) or "{}" in diff
    shown = CliRunner().invoke(app, ["config", "show", "vilt_b32", "--diff", "seed=5", "name=010"]).stdout.splitlines()
    assert {"seed: 5  # default: 0", "  kind: vilt  # default: vlmo", "name: '010'  # required"} <= {*shown}


def test_every_key_is_explained_by_its_path_its_end_and_other_trainers_name() -> None:
    for path in paths():
        result, text = explain_key(path)
        (key,) = result["keys"]
        assert (key["path"], key["description"] != "", path in text) == (path, True, True)
    for name in ("lr", "learning_rate", "stages.pairs.optimizer.lr", "learnin_rate"):
        result, text = explain_key(name)
        assert result["keys"][0]["path"] == "stages.NAME.optimizer.lr"
        assert all(part in text for part in ("number > 0", "0.0002", "may change", "demo 0.001", "      optimizer:\n"))
    assert [key["path"] for key in explain_key("batch_size")[0]["keys"]][1:] == ["evaluation.batch_size"]
    assert "1e-06 (vlmo, vilt, vit); 1e-12 (imagebert)" in explain_key("model.norm_eps")[0]["keys"][0]["default"]
    with pytest.raises(ConfigError, match="no key 'xyzzy'"):
        explain_key("xyzzy")


def test_schema_describes_every_property_and_accepts_the_recipes() -> None:
    schema = json.loads(CliRunner().invoke(app, ["config", "schema"]).stdout)
    assert schema == json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["description"]
        assert all(key["description"] for key in section["properties"].values())
        assert all(key.get("title", name) == name for name, key in section["properties"].items())
    validator = jsonschema.Draft202012Validator(schema)
    for path in RECIPES.rglob("*.yaml"):
        validator.validate(parse_yaml(path.read_bytes(), path.name))
    faults = [*validator.iter_errors({"name": "a", "sources": {}, "stages": [], "model": {"widht": 1}})]
    assert len(faults) == 2


def test_options_that_are_keys_are_answered_with_the_key() -> None:
    answers = {"--steps 10": "stages.NAME.steps=10", "--lr=1e-3": "stages.NAME.optimizer.lr=1e-3"}
    for options, expected in (answers | {"--gpus": "cluster.workers=VALUE"}).items():
        error = CliRunner().invoke(app, ["train", "demo", *options.split()]).exception
        assert isinstance(error, ConfigError)
        assert str(error).endswith(f"keys of the config have no dashes: {expected}")
    assert "No such option: --xyzzy" in CliRunner().invoke(app, ["train", "demo", "--xyzzy"]).output
