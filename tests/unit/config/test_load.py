"""Loading a YAML gives a valid config, or one error that lists its faults; the reference describes every key."""

import contextlib
import copy
import itertools
import os
import random
from pathlib import Path

import pytest
import yaml

from pipeline.config import load
from pipeline.config.errors import ConfigError
from pipeline.config.keys import SYNONYMS, find_keys, paths
from pipeline.config.load import load_config, parse_yaml, resolve_secret, with_absolute_paths
from pipeline.config.reference import markdown
from pipeline.config.schema import RunConfig
from pipeline.config.urls import absolute, file_name_of, is_local, local_path, parse
from pipeline.data.storage import Storage
from tests.support.fuzz import fuzz_rounds, mutate

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
DEMO = CONFIGS / "demo.yaml"


def test_every_config_of_the_project_loads_and_the_reference_describes_every_key():
    paths = sorted(CONFIGS.glob("**/*.yaml"))
    assert len(paths) > 10
    assert all(load_config(path).stages for path in paths)
    text, schema = markdown(), RunConfig.model_json_schema()
    stored = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert stored == text, "run `python -m pipeline.config.reference > configs/README.md`"
    for name, section in [("run", schema), *schema["$defs"].items()]:
        assert section.get("description"), name
        assert {key for key, value in section["properties"].items() if not value.get("description")} <= {"kind"}, name
        assert all(f"\n| `{key}`" in text for key in section["properties"])


def test_all_faults_are_reported_at_once_with_suggestions():
    precision = "'float32' or 'bfloat16' (got 'float3'); did you mean 'float32'"
    faults = {
        "stages.vision.stepps=10": "stages.vision.stepps: unknown key; did you mean 'steps'?",
        "engine.precision=float3": f"engine.precision: Input should be {precision}",
        "model.width=wide": "model.width: Input should be a valid integer",
        "data.augment.flp=true": "data.augment.flp: unknown key; did you mean 'flip'?",
    }
    with pytest.raises(ConfigError) as error:
        load_config(DEMO, [*faults])
    assert [part for part in ("4 faults", *faults.values()) if part not in str(error.value)] == []
    between = ["engine.zero_stage=0", "evaluation.source=nope", "stages.vision.global_batch_size=63"]
    with pytest.raises(ConfigError, match=r"(?s)3 faults.*engine\.precision: .*source: .*global_batch_size: "):
        load_config(DEMO, [*between, "engine.precision=bfloat16"])
    with pytest.raises(ConfigError, match="width 130 must be a multiple of heads 3; image_size 50 must be a multiple"):
        load_config(DEMO, ["model={kind: vlmo, width: 130, heads: 3, image_size: 50}"])


INVALID: dict[str, list[str]] = {  # expected part of the message -> overrides
    "unknown source 'scnes'": ["stages.vision.sources={scnes: 1.0}"],
    "must be a multiple of data.streams": ["stages.vision.global_batch_size=63"],
    "all sources of a stage must have one type": ["stages.vision.sources={scenes: 1.0, sentences: 1.0}"],
    "(got 'mlmm'); did you mean 'mlm'?": ["stages.vision.objectives={mlmm: {}}"],
    "another stage has the name": ["stages.language.name=vision"],
    "bfloat16 at ZeRO 0 would have no float32 master weights": ["engine={zero_stage: 0, precision: bfloat16}"],
    "ZeRO 0 keeps all state on the device": ["engine={zero_stage: 0, offload_optimizer: true}"],
    "at ZeRO 2 every rank computes with whole weights": ["engine={zero_stage: 2, offload_parameters: true}"],
    "engine.compile: ZeRO 3 gathers each module's weights in hooks": ["engine={zero_stage: 3, compile: true}"],
    "expected a whole number, or a fraction below 1": ["cluster.gpus_per_worker=1.5"],
    "model: Input should be an object (got 'vlmo')": ["model=vlmo"], "(got None)": ["model.kind=null"],
    "must be a reference": ["storage.key=AKIA123"], "stages: ": ["stages=[]"], "expected key=value": ["steps"],
    "no element": [f"stages.{part}.steps=1" for part in ("nothing", "²", "9" * 5000, "-1", "3", "00")],
    "seed": [f"seed={value}" for value in ("1:30", "010", "-010", "1:30.5", "0o17")],
    "is not a valid int": ["seed=" + "9" * 5000], "digits": ["seed=0x" + "f" * 5000],
    # beyond the limit of threads, beyond int64, and not finite
    "guards.hang_seconds": ["guards.hang_seconds=1e12"], "tracking.flush_seconds": ["tracking.flush_seconds=1e12"],
    "stages.vision.steps": [f"stages.vision.steps={10**20}"], "data.shuffle_window": [f"data.shuffle_window={10**20}"],
    "engine.memory_gb": [f"engine.memory_gb={value}" for value in (".inf", "-.inf", ".nan", "1e999")],
    "stages.vision.sources.scenes": ["stages.vision.sources.scenes=.inf"],
    "data.augment.crop_scale.1": ["data.augment={crop_scale: [0.5, .nan]}"],
    "one fault\nstages.vision_language.global_batch_size: ": ["stages.vision_language.global_batch_size=abc"],
    "one fault\nstages.language.nme: unknown key; did you mean 'name'?": ["stages.1.nme=x"],
    "lr: unknown key; did you mean stages.vision.optimizer.lr, stages.language.optimizer.lr or stages.": ["lr=1e-3"],
    "did you mean stages.vision.optimizer.lr, ": ["optimiser.lr=1", "learning_rate=1", "training.optimizer.lr=1"],
    "stages.vision.lr: unknown key; did you mean stages.vision.optimizer.lr?": ["stages.vision.lr=1"],
    "did you mean stages.vision.global_batch_size, ": ["batch_size=4", "train_batch_size=4"],
    "steps = epochs x samples / global_batch_size": ["epochs=3", "num_train_epochs=3", "stages.vision.epochs=3"],
    "did you mean stages.vision.steps, ": ["steps=10", "training.steps=3", "max_steps=4"],
    "did you mean data.loader.num_workers?": ["num_workers=2", "data.num_workers=2", "dataloader_num_workers=2"],
    "did you mean engine.micro_batch_size?": ["micro_batch=4", "per_device_train_batch_size=4"],
    "did you mean cluster.workers?": ["gpus=3", "workers=3", "num_gpus=3"],
    "model.depth: unknown key; did you mean 'layers'?": ["model.depth=3"],
    "model.longest_side: unknown key; it is a key of model.kind vilt": ["model.longest_side=640"],
    "foo: unknown key; known: name, output, seed": ["foo=1"],
    "first a letter or digit (got 'my run'); did you mean 'my_run'?": ["name=my run"],
    "data.cache.folder: must be a folder on each node's own disk": ["data.cache.folder=s3://bucket/cache"],
    "tracking.profile": [
        f"tracking.profile={steps}"
        for steps in ("10:5", "5:5", "5", "²:5", "a:b", "'1:2\n'", "9" * 5000 + ":" + "9" * 5001)
    ],
}  # fmt: skip


@pytest.mark.parametrize("expected", INVALID)
def test_invalid_values_are_rejected_by_key(expected):
    for override in INVALID[expected]:
        with pytest.raises(ConfigError) as error:
            load_config(DEMO, [override])
        assert expected in str(error.value), override[:100]


def test_overrides_use_dotted_paths_and_numbers_are_read_as_in_yaml_1_2(tmp_path):
    config = load_config(DEMO, ["stages.vision.steps=7", "stages.1.optimizer.lr=3e-5", "tracking.profile=5:10"])
    assert (config.stages[0].steps, config.stages[1].optimizer.lr, config.tracking.profile) == (7, 3e-5, "5:10")
    (tmp_path / "run.yaml").write_text("name: a\nstages: [null]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"stages\.0\.name: required"):  # the empty element was filled
        load_config(tmp_path / "run.yaml", ["stages.0.steps=1"])
    numbers = {"0": 0, "-7": -7, "+7": 7, "1_000": 1000, "0x1F": 31, "0b11": 3, "1.5": 1.5, "-.5": -0.5, "1.": 1.0}
    numbers |= {"2e5": 2e5, "1.5e+3": 1500.0, "00.5": 0.5, "1e-4": 1e-4}
    values = numbers | {text: text for text in ("1:30", "007", "1.2.3", "1e", ".", "10.0.0.1:80")}
    assert {text: repr(parse_yaml(text, "x")) for text in values} == {text: repr(v) for text, v in values.items()}


TAGS = ("int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "map", "value", "x")


def test_any_value_at_any_key_and_mutated_or_mistagged_files_raise_only_config_errors(tmp_path):
    demo, keys = parse_yaml(DEMO.read_bytes(), "demo"), load.flatten(load_config(DEMO).model_dump(mode="json"))
    paths = sorted({key.rsplit(".", depth)[0] for key in keys for depth in range(4)})
    texts = ("null", "5", "text", "[]", "[1]", "true", "1.5", "2024-01-01", "{a: {b: c}}")
    for path, value in itertools.product(paths, texts):
        values = copy.deepcopy(demo)
        with contextlib.suppress(ConfigError):
            load.apply_override(values, f"{path}={value}")
            load.validate(values, "demo")
    rng, content = random.Random(14), DEMO.read_bytes()
    for _ in range(fuzz_rounds(60)):
        (tmp_path / "run.yaml").write_bytes(mutate(content, rng))
        with contextlib.suppress(ConfigError):
            load_config(tmp_path / "run.yaml")
    for value, tag in itertools.product(("''", "maybe", "x", "é", "[1]", "{a: 1}"), TAGS):
        for text in (f"!!{tag} {value}", f"[!!{tag} {value}]"):
            with contextlib.suppress(ConfigError):
                load_config(DEMO, [f"tracking.experiment={text}"])


UNREADABLE: dict[str, list[bytes]] = {  # expected part of the message -> contents of a file
    "a key is a mapping": [b"output: {{ bucket }}\n"], "a key is a sequence": [b"? [a, b]\n: c\n"],
    "duplicate key 'name'": [b"name: a\nname: b\n"],
    "line 2: 'maybe' is not a valid bool": [b"name: a\nseed: !!bool maybe\n"],
    "not UTF-8 text": ["name: caf\xe9\n".encode("latin-1"), b"\x00"],
    "contains itself": [b"name: &a [*a]\n", b"name: &a {b: *a}\n"], "nested too deep": [b"[" * 5000],
    "not valid YAML": [b"name: 2026-99-99\n", b"<<: 5\n", b"a: !!python/object:os.system x\n", b"a: *missing\n"],
    "not valid Unicode": [b'name: "a\\ud83d"\n'], "a list": [b"- a\n"],
    "it is empty; expected a mapping": [b"", b"# nothing\n"],
}  # fmt: skip


def test_file_that_is_not_a_config_is_one_message_and_other_files_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match=r"run\.yaml: no such file, and no such recipe"):
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
    assert (values["deep"]["deeper"]["base"], values["c"]) == ({"x": 2, "y": 1}, {"x": 2, "y": 1, "z": 3})


def test_a_recipe_is_found_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as with an installed wheel, without the folder `configs`
    names = ("demo", "demo.yaml", "configs/demo.yaml", Path("demo"))
    assert [load_config(name) for name in names] == [load_config(DEMO)] * 4
    assert load_config("finetune/vilt_b32_vqa").name == "vilt_b32_vqa"
    (tmp_path / "vlmo_base").mkdir()
    assert load_config("vlmo_base").name == "vlmo_base"
    (tmp_path / "demo").write_text("name: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="demo: not valid YAML"):
        load_config("demo")
    (tmp_path / "pairs.yaml").write_bytes(b"")
    hints = {"pair.yaml": "did you mean pairs.yaml?", "vlmo_bas": "did you mean vlmo_base?", "xyzzy": "config list"}
    for name, hint in hints.items():
        with pytest.raises(ConfigError, match=f"{name}: no such file, and no such recipe; .*") as error:
            load_config(name)
        assert hint in str(error.value)


def test_synonyms_are_of_keys_and_are_not_keys_of_their_own_section():
    for path, names in SYNONYMS.items():
        section, _, last = path.rpartition(".")
        assert path in paths()
        assert last not in names.split()
        assert [name for name in names.split() if f"{section}.{name}".strip(".") in paths()] == []
        assert all(path in find_keys(name) for name in names.split())


def test_a_source_may_have_any_name_that_is_no_path(tmp_path):
    values, path = yaml.safe_load(DEMO.read_text(encoding="utf-8")), tmp_path / "run.yaml"
    paths = ("", "..", "../x", "/etc", "a\\b", "a\nb", 101 * "a")
    for name in ("coco.2017", "a=b", "storage", "0", "with space", 'quo"te', *paths):
        sources = {**values["sources"], name: {"shards": "runs/some", "type": "text"}}
        path.write_text(yaml.safe_dump(values | {"sources": sources}), encoding="utf-8")
        if name in paths:
            with pytest.raises(ConfigError, match="the name of a source"):
                load_config(path)
            continue
        source = with_absolute_paths(load_config(path)).sources[name]
        assert (Path(source.shards).is_absolute(), source.type) == (True, "text")
        if '"' not in name:
            assert load_config(path, [f'sources."{name}".shards=s3://b/x']).sources[name].shards == "s3://b/x"
        if name in ("coco.2017", "storage", "0"):  # unquoted, a key that contains a dot is found where it is
            changed = load_config(path, [f"sources.{name}.type=images", "sources.new.shards=runs/new"]).sources
            assert (changed[name].type, changed["new"].shards) == ("images", "runs/new")
    for name in ("../../evil", "/etc/evil", "a/../b", "a\\..\\b", "a\0b", "a\nb", "..", "pairs", "a.b@c"):
        part = file_name_of(f"{name}.json")  # of any other name in a config
        assert (Path(part).name, len(Path("folder", part).parts), part.isprintable()) == (part, 2, True)


def test_local_paths_become_absolute_and_only_changeable_keys_may_differ():
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
    assert (allowed.keys(), refused.keys()) == ({"stages.0.steps", "cluster.workers"}, {"model.width", "seed"})
    assert not load.is_changeable("sources.storage.type")  # `storage` is a source's name here, not the section
    assert all(map(load.is_changeable, ("sources.storage.shards", "stages.2.optimizer.lr")))


def test_secrets_are_read_by_reference_and_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MOME_TEST_KEY", "from env")
    assert resolve_secret("env:MOME_TEST_KEY") == "from env"
    reference = f"file:{tmp_path / 'key'}"
    for content in (b"value\n", b"value\r\n", b"  value \n", b"\xef\xbb\xbfvalue"):
        (tmp_path / "key").write_bytes(content)
        assert resolve_secret(reference) == "value"
    broken = dict.fromkeys((b"head\r\ntail", b"head\x00tail"), "contains a line break")
    for content, expected in (broken | {b" \r\n": "is empty", b"\xff\xfe\x00": "not UTF-8 text"}).items():
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(ConfigError, match=expected) as error:
            resolve_secret(reference)
        assert "tail" not in str(error.value)
    for absent in ("file:/absent", "file:/tmp", "file:~nobody-here/key", "file:a\x00b", "env:MOME_ABSENT"):
        with pytest.raises(ConfigError, match=r"cannot be read|MOME_ABSENT is not set"):
            resolve_secret(absent)


REJECTED: dict[str, list[str]] = {  # expected part of the message -> URLs
    "'s3://bucket/x'": [
        "s3:/bucket/x", "s3:bucket/x", "S3://bucket/x", "S3:/bucket/x", "s3//bucket/x", "s3:\\\\bucket\\x", "s3:///bucket/x",
        "://bucket/x", "./s3://bucket/x", "/home/me/s3:/bucket/x", "./s3:/bucket/x", "s3 ://bucket/x", " s3://bucket/x",
        "s3://bucket/x\r", "s3://bucket/x\n",
    ],
    "names no bucket": ["s3://"], "s3://": ["s3:"], "'env:NAME'": ["s3://key:word-of-pass@bucket/x"],
    "'gs://bucket/x'": ["gs:/bucket/x", "GS://bucket/x"], "'gs://bucket'": ["gs:///bucket"],
    "'hf://org/name'": ["hf:org/name"], "'https://host/x'": ["https:/host/x"],
    "'unknown://host/x'": ["unknown:/host/x"], "$(": ["$(pwd)/runs"], "%SCRATCH%": ["%SCRATCH%/runs"],
    "'file:///abs/x'": ["file:/abs/x", "file:abs/x", "File:///abs/x", "file://abs/x", "file://localhost/abs/x"],
    "'file://abs/x'": ["FILE://abs/x"], "file:///": ["file://"],
    "${SCRATCH}": ["${SCRATCH}/runs"], "${oc.env:SCRATCH}": ["${oc.env:SCRATCH}/runs"], "$SCRATCH": ["$SCRATCH/runs"],
    "$BUCKET": ["s3://$BUCKET/runs"], "${USER}": ["s3://bucket/${USER}"], "$USER": ["runs/$USER"],
    "{{ bucket }}": ["s3://{{ bucket }}/runs"], "<bucket>": ["s3://<bucket>/runs"],
    "home folder of": ["~nobody-of-this-name/runs", "file://~nobody-of-this-name/runs"],
    "'~/runs'": ["/data/~/runs", "./~/runs"], "Windows": ["C:\\runs", "C:/runs"], "empty": ["", "  "],
    "control character": ["a\x00b", "a\x1b[2Jb"], "runs a program": ["pipe:cat x", "/data/pipe:cat x", "reference://x"],
}  # fmt: skip
WRONG = {url: expected for expected, urls in REJECTED.items() for url in urls}
LOCAL = [
    "/abs/x", "/", ".", "runs", "a:b", "/data/12:30:00/x", "a$b/c$", "{000..012}.tar", "100%/50%", "x~/~x", "./~x",
    "日本/é", "s3x", "s3/x", "https",
]  # fmt: skip
RIGHT = {
    "s3://bucket/x": ("s3", "bucket/x"), "s3://bucket": ("s3", "bucket"), "s3a://bucket/x/": ("s3", "bucket/x"),
    "s3://bucket/a:b/~/x y": ("s3", "bucket/a:b/~/x y"), "gs://bucket/x": ("gs", "gs://bucket/x"),
    "memory://x": ("memory", "memory://x"), "memory:///x": ("memory", "memory:///x"),
    "https://host/caf%C3%A9.tar?token=1": ("https", "https://host/caf%C3%A9.tar?token=1"),
    "file:///abs/x": ("file", "/abs/x"), "file://~/x": ("file", os.path.expanduser("~/x")),
    **{path: ("file", os.path.expanduser(path)) for path in ("~/x", "~")},
    **{path: ("file", path) for path in LOCAL},
}  # fmt: skip
KEYS = [
    "output", "tokenizer.vocabulary", "sources.scenes.shards", "sources.scenes.opt_out", "stages.vision.start_from",
    "stages.vision.answer_list", "data.cache.folder",
]  # fmt: skip


def test_every_function_and_config_key_rejects_malformed_urls_with_the_correct_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage = Storage()
    calls = (parse, is_local, local_path, absolute, storage.read, storage.exists, storage.list, storage.delete)
    calls += (lambda url: storage.write(url, b"x"), lambda url: storage.upload(__file__, url))
    for url, expected in WRONG.items():
        for call in calls:
            with pytest.raises(ConfigError) as raised:
                call(url)
            assert expected in str(raised.value), url
            assert "word-of-pass" not in str(raised.value)
            assert str(raised.value).isprintable()
    assert os.listdir(tmp_path) == []
    assert {url: parse(url) for url in RIGHT} == RIGHT
    for url in ("s3:/bucket/x", "${SCRATCH}/runs"):
        with pytest.raises(ConfigError) as raised:
            load_config(DEMO, [f"{key}={url}" for key in KEYS])
        for key in KEYS:
            (line,) = [line for line in str(raised.value).splitlines() if line.startswith(f"{key}: ")]
            assert WRONG[url] in line
