"""One YAML is one run, or one error that lists every fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.errors import ConfigError
from pipeline.config.load import changes, is_changeable, load_config, resolve_secret

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DEMO = CONFIGS / "demo.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_project_loads(path: Path) -> None:
    assert load_config(path).stages


def test_all_faults_come_at_once_with_dotted_paths_and_suggestions() -> None:
    overrides = ["stages.vision.stepps=10", "engine.precision=float3", "model.width=wide", "data.augment.flp=true"]
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, overrides)
    told = str(error.value)
    assert "4 faults" in told
    assert "stages.0.stepps: unknown key; did you mean 'steps'?" in told
    assert "engine.precision: Input should be 'float32' or 'bfloat16' (got 'float3'); did you mean 'float32'?" in told
    assert "model.width: Input should be a valid integer" in told
    assert "data.augment.flp: unknown key; did you mean 'flip'?" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.vision.sources={scnes: 1.0}", "unknown source 'scnes'"),
        ("stages.vision.batch=63", "must be a multiple of data.lanes"),
        ("stages.vision.sources={scenes: 1.0, sentences: 1.0}", "all sources of a stage must have one use"),
        ("stages.language.objectives={masked_image: {}}", "masked_image needs sources read as images or pairs"),
        ("stages.vision_language.objectives={matching: {}}", "add contrastive"),
        ("stages.language.name=vision", "another stage has this name"),
        ("evaluation.source=pictures", "expected a source read as pairs, labelled"),
        ("engine={zero_stage: 0, precision: bfloat16}", "bfloat16 at ZeRO 0 would have no float32 master weights"),
        ("engine={zero_stage: 0, offload_optimizer: true}", "ZeRO 0 keeps all state on the device"),
        ("engine={zero_stage: 2, offload_parameters: true}", "at ZeRO 2 every rank computes with whole weights"),
        ("engine={zero_stage: 3, compile: true}", "engine.compile: ZeRO 3 gathers each module's weights in hooks"),
        ("model.width=130", "must be a multiple of heads"),
        ("storage.key=AKIA123", "must be a reference"),
        ("stages.nothing.steps=3", "no element 'nothing'"),
        ("steps", "expected key=value"),
    ],
)
def test_what_cannot_run_is_refused_by_name(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("[", r"\[")):
        load_config(DEMO, [override])


def test_overrides_are_the_same_dotted_paths_and_pass_the_same_validation() -> None:
    config = load_config(DEMO, ["stages.vision.steps=7", "stages.1.optimizer.peak_rate=3e-5", "cluster.workers=1"])
    assert (config.stages[0].steps, config.stages[1].optimizer.peak_rate, config.cluster.workers) == (7, 3e-5, 1)


def test_a_number_with_an_exponent_and_no_point_is_a_number(tmp_path: Path) -> None:
    text = DEMO.read_text(encoding="utf-8").replace("peak_rate: 1e-3", "peak_rate: 1e-4")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert load_config(tmp_path / "run.yaml").stages[0].optimizer.peak_rate == 1e-4


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: a\nname: b\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="duplicate key 'name'"):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file_is_one_message() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config("nowhere.yaml")


def test_only_keys_declared_changeable_may_differ_on_resume() -> None:
    before = load_config(DEMO)
    after = load_config(DEMO, ["stages.vision.steps=999", "cluster.workers=1", "model.width=64", "seed=8"])
    allowed, refused = changes(before, after)
    assert allowed.keys() == {"stages.0.steps", "cluster.workers"}
    assert refused.keys() == {"model.width", "seed"}


def test_keys_of_free_mappings_are_not_taken_for_schema_keys() -> None:
    assert not is_changeable("sources.storage.use")
    assert is_changeable("sources.storage.shards")
    assert is_changeable("stages.2.optimizer.peak_rate")


def test_secrets_are_read_by_reference_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from file\n", encoding="utf-8")
    monkeypatch.setenv("MOME_TEST_KEY", "from env")
    assert resolve_secret("env:MOME_TEST_KEY") == "from env"
    assert resolve_secret(f"file:{tmp_path / 'key'}") == "from file"
    with pytest.raises(ConfigError, match="MOME_ABSENT is not set"):
        resolve_secret("env:MOME_ABSENT")
