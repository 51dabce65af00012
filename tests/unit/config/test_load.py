"""Loading a YAML gives a valid config, or one error that lists all of its faults; the reference describes every key."""

import contextlib
import copy
import random
from pathlib import Path

import pytest
import yaml

from pipeline.config import load
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config, parse_yaml, resolve_secret, with_absolute_paths
from pipeline.config.reference import markdown
from pipeline.config.schema import RunConfig
from pipeline.config.urls import file_name_of
from tests.support.fuzz import fuzz_rounds, mutate

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DEMO = CONFIGS / "demo.yaml"


def test_every_config_of_the_project_loads_and_the_reference_describes_every_key() -> None:
    paths = sorted(CONFIGS.glob("**/*.yaml"))
    assert len(paths) > 10
    assert all(load_config(path).stages for path in paths)
    text, schema = markdown(), RunConfig.model_json_schema()
    remedy = "run `python -m pipeline.config.reference > configs/README.md`"
    assert (CONFIGS / "README.md").read_text(encoding="utf-8") == text, remedy
    for name, section in [("run", schema), *schema["$defs"].items()]:
        assert section.get("description"), name
        assert {key for key, value in section["properties"].items() if not value.get("description")} <= {"kind"}, name
        assert all(f"\n| `{key}`" in text for key in section["properties"])


def test_all_faults_are_reported_at_once_with_suggestions() -> None:
    overrides = ["stages.vision.stepps=10", "engine.precision=float3", "model.width=wide", "data.augment.flp=true"]
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, overrides)
    for expected in (
        "4 faults",
        "stages.vision.stepps: unknown key; did you mean 'steps'?",
        "engine.precision: Input should be 'float32' or 'bfloat16' (got 'float3'); did you mean 'float32'",
        "model.width: Input should be a valid integer",
        "data.augment.flp: unknown key; did you mean 'flip'?",
    ):
        assert expected in str(error.value)
    between = ["engine.zero_stage=0", "evaluation.source=nope", "stages.vision.global_batch_size=63"]
    with pytest.raises(ConfigError, match=r"(?s)3 faults.*engine\.precision: .*source: .*global_batch_size: "):
        load_config(DEMO, [*between, "engine.precision=bfloat16"])
    with pytest.raises(ConfigError, match="width 130 must be a multiple of heads 3; image_size 50 must be a multiple"):
        load_config(DEMO, ["model={kind: vlmo, width: 130, heads: 3, image_size: 50}"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.vision.sources={scnes: 1.0}", "unknown source 'scnes'"),
        ("stages.vision.global_batch_size=63", "must be a multiple of data.streams"),
        ("stages.vision.sources={scenes: 1.0, sentences: 1.0}", "all sources of a stage must have one type"),
        ("stages.vision.objectives={mlmm: {}}", "(got 'mlmm'); did you mean 'mlm'?"),
        ("stages.language.name=vision", "another stage has the name"),
        ("engine={zero_stage: 0, precision: bfloat16}", "bfloat16 at ZeRO 0 would have no float32 master weights"),
        ("engine={zero_stage: 0, offload_optimizer: true}", "ZeRO 0 keeps all state on the device"),
        ("engine={zero_stage: 2, offload_parameters: true}", "at ZeRO 2 every rank computes with whole weights"),
        ("engine={zero_stage: 3, compile: true}", "engine.compile: ZeRO 3 gathers each module's weights in hooks"),
        ("cluster.gpus_per_worker=1.5", "expected a whole number, or a fraction below 1"),
        ("model=vlmo", "model: Input should be an object (got 'vlmo')"),
        ("model.kind=null", "model.kind: expected vlmo"),
        ("storage.key=AKIA123", "must be a reference"),
        ("stages=[]", "stages: "),
        ("steps", "expected key=value"),
        *((f"stages.{part}.steps=1", "no element") for part in ("nothing", "²", "9" * 5000, "-1", "3", "00")),
        *((f"seed={value}", "seed") for value in ("1:30", "010", "-010", "1:30.5", "0o17")),
        ("seed=" + "9" * 5000, "is not a valid int"),
        ("seed=0x" + "f" * 5000, "digits"),
        # beyond the limit of threads, beyond int64, and not finite
        *((f"{key}=1e12", key) for key in ("guards.hang_seconds", "tracking.flush_seconds")),
        *((f"{key}={10**20}", key) for key in ("stages.vision.steps", "data.shuffle_window")),
        *((f"engine.memory_gb={value}", "engine.memory_gb") for value in (".inf", "-.inf", ".nan", "1e999")),
        ("stages.vision.sources.scenes=.inf", "stages.vision.sources.scenes"),
        ("data.augment={crop_scale: [0.5, .nan]}", "data.augment.crop_scale.1"),
        ("stages.vision_language.global_batch_size=abc", "one fault\nstages.vision_language.global_batch_size: "),
        ("stages.1.nme=x", "one fault\nstages.language.nme: unknown key; did you mean 'name'?"),
        ("data.cache.folder=s3://bucket/cache", "data.cache.folder: must be a folder on each node's own disk"),
        *(
            (f"tracking.profile={steps}", "tracking.profile")
            for steps in ("10:5", "5:5", "5", "²:5", "a:b", "'1:2\n'", "9" * 5000 + ":" + "9" * 5001)
        ),
    ],
)
def test_invalid_values_are_rejected_by_key(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, [override])
    assert expected in str(error.value)


def test_overrides_use_dotted_paths_and_numbers_are_read_as_in_yaml_1_2(tmp_path: Path) -> None:
    config = load_config(DEMO, ["stages.vision.steps=7", "stages.1.optimizer.lr=3e-5", "tracking.profile=5:10"])
    assert (config.stages[0].steps, config.stages[1].optimizer.lr, config.tracking.profile) == (7, 3e-5, "5:10")
    (tmp_path / "run.yaml").write_text("name: a\nstages: [null]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"stages\.0\.name: required"):  # the empty element was filled
        load_config(tmp_path / "run.yaml", ["stages.0.steps=1"])
    numbers = {
        "0": 0, "-7": -7, "+7": 7, "1_000": 1000, "0x1F": 31, "0b11": 3, "1.5": 1.5, "-.5": -0.5, "1.": 1.0,
        "2e5": 2e5, "1.5e+3": 1500.0, "00.5": 0.5, "1e-4": 1e-4,
    }  # fmt: skip
    texts = ("1:30", "007", "1.2.3", "1e", ".", "10.0.0.1:80")
    assert {text: repr(parse_yaml(text, "x")) for text in numbers} == {text: repr(n) for text, n in numbers.items()}
    assert [parse_yaml(text, "x") for text in texts] == [*texts]


TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "map", "value", "x")


@pytest.mark.parametrize("value", ["null", "5", "text", "[]", "[1]", "true", "1.5", "2024-01-01", "{a: {b: c}}"])
def test_value_of_any_type_at_any_key_raises_only_config_errors(value: str) -> None:
    demo, keys = parse_yaml(DEMO.read_bytes(), "demo"), load.flatten(load_config(DEMO).model_dump(mode="json"))
    for path in sorted({key.rsplit(".", depth)[0] for key in keys for depth in range(4)}):
        values = copy.deepcopy(demo)
        with contextlib.suppress(ConfigError):
            load.apply_override(values, f"{path}={value}")
            load.validate(values, "demo")


def test_mutated_and_mistagged_values_raise_only_config_errors(tmp_path: Path) -> None:
    rng, content = random.Random(14), DEMO.read_bytes()
    for _ in range(fuzz_rounds(60)):
        (tmp_path / "run.yaml").write_bytes(mutate(content, rng))
        with contextlib.suppress(ConfigError):
            load_config(tmp_path / "run.yaml")
    for value in ("''", "maybe", "x", "é", "[1]", "{a: 1}"):
        for tagged in (f"!!{tag} {value}" for tag in TAGS):
            for text in (tagged, f"[{tagged}]"):
                with contextlib.suppress(ConfigError):
                    load_config(DEMO, [f"tracking.experiment={text}"])


UNREADABLE: dict[str, list[bytes]] = {  # expected part of the message -> contents of a file
    "a key is a mapping": [b"output: {{ bucket }}\n"], "a key is a sequence": [b"? [a, b]\n: c\n"],
    "duplicate key 'name'": [b"name: a\nname: b\n"],
    "line 2: 'maybe' is not a valid bool": [b"name: a\nseed: !!bool maybe\n"],
    "not UTF-8 text": ["name: caf\xe9\n".encode("latin-1"), b"\x00"],
    "contains itself": [b"name: &a [*a]\n", b"name: &a {b: *a}\n"], "nested too deep": [b"[" * 5000],
    "not valid YAML": [b"name: 2026-99-99\n", b"<<: 5\n", b"a: !!python/object:os.system x\n", b"a: *missing\n"],
    "not valid Unicode": [b'name: "a\\ud83d"\n'], "an empty file": [b""], "a list": [b"- a\n"],
}  # fmt: skip


def test_file_that_is_not_a_config_is_one_message_and_other_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read"):
        load_config(path)
    for expected, contents in UNREADABLE.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(ConfigError, match=rf"run\.yaml.*{expected}"):
                load_config(path)
    for encoding in ("utf-8-sig", "utf-16"):  # as Windows writes it
        path.write_bytes(DEMO.read_text(encoding="utf-8").encode(encoding))
        assert load_config(path) == load_config(DEMO)
    merged = "a: &a {x: 1, y: 1}\ndeep: {deeper: {base: &b {<<: *a, x: 2}}}\nc: {<<: *b, z: 3}\n"
    values = parse_yaml(merged, "here")  # merge keys are overridden by the mapping
    assert values["deep"]["deeper"]["base"] == {"x": 2, "y": 1}
    assert values["c"] == {"x": 2, "y": 1, "z": 3}


def test_a_source_may_have_any_name_that_is_no_path(tmp_path: Path) -> None:
    values, path = yaml.safe_load(DEMO.read_text(encoding="utf-8")), tmp_path / "run.yaml"
    sources = dict(values["sources"])
    paths = ("", "..", "../x", "/etc", "a\\b", "a\nb", 101 * "a")
    for name in ("coco.2017", "a=b", "storage", "0", "with space", 'quo"te', *paths):
        values["sources"] = {**sources, name: {"shards": "runs/some", "type": "text"}}
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        if name in paths:
            with pytest.raises(ConfigError, match="the name of a source"):
                load_config(path)
            continue
        config = with_absolute_paths(load_config(path))
        assert Path(config.sources[name].shards).is_absolute()
        assert config.sources[name].type == "text"
        if '"' not in name:
            assert load_config(path, [f'sources."{name}".shards=s3://b/x']).sources[name].shards == "s3://b/x"
        if name in ("coco.2017", "storage", "0"):  # unquoted, a key that contains a dot is found where it is
            changed = load_config(path, [f"sources.{name}.type=images", "sources.new.shards=runs/new"]).sources
            assert (changed[name].type, changed["new"].shards) == ("images", "runs/new")
    for name in ("../../evil", "/etc/evil", "a/../b", "a\\..\\b", "a\0b", "a\nb", "..", "pairs", "a.b@c"):
        part = file_name_of(f"{name}.json")  # of any other name in a config
        assert (Path(part).name, len(Path("folder", part).parts), part.isprintable()) == (part, 2, True)


def test_local_paths_become_absolute_and_only_changeable_keys_may_differ() -> None:
    keys = ("tokenizer.vocabulary", "sources.scenes.opt_out", "stages.vision.start_from", "stages.vision.answer_list")
    overrides = [f"{key}=file" for key in (*keys, "data.cache.folder", "output")]
    config = load_config(DEMO, [*overrides, "stages.vision.image_tokenizer={weights: dalle}"])
    absolute = with_absolute_paths(config)
    assert len(load.local_paths(config)) == len(load.local_paths(absolute))
    assert all(Path(path).is_absolute() for path in load.local_paths(absolute).values())
    assert Path(absolute.data.cache.folder or "").is_absolute()
    assert with_absolute_paths(absolute) == absolute
    after = load_config(DEMO, ["stages.vision.steps=999", "cluster.workers=1", "model.width=64", "seed=8"])
    allowed, refused = load.changes(load_config(DEMO), after)
    assert allowed.keys() == {"stages.0.steps", "cluster.workers"}
    assert refused.keys() == {"model.width", "seed"}
    assert not load.is_changeable("sources.storage.type")  # `storage` is a source's name here, not the section
    assert all(map(load.is_changeable, ("sources.storage.shards", "stages.2.optimizer.lr")))


def test_secrets_are_read_by_reference_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOME_TEST_KEY", "from env")
    assert resolve_secret("env:MOME_TEST_KEY") == "from env"
    reference = f"file:{tmp_path / 'key'}"
    for content in (b"value\n", b"value\r\n", b"  value \n", b"\xef\xbb\xbfvalue"):
        (tmp_path / "key").write_bytes(content)
        assert resolve_secret(reference) == "value"
    broken = {b"head\r\ntail": "contains a line break", b"head\x00tail": "contains a line break"}
    for content, expected in (broken | {b" \r\n": "is empty", b"\xff\xfe\x00": "not UTF-8 text"}).items():
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(ConfigError, match=expected) as error:
            resolve_secret(reference)
        assert "tail" not in str(error.value)
    for absent in ("file:/absent", "file:/tmp", "file:~nobody-here/key", "file:a\x00b", "env:MOME_ABSENT"):
        with pytest.raises(ConfigError, match=r"cannot be read|MOME_ABSENT is not set"):
            resolve_secret(absent)
