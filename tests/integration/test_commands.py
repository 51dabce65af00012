"""Mistakes of users end in one message and the documented exit status; the wheel runs outside a checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from jobs.console import RunDisplay
from jobs.driver import Interrupts
from jobs.submit import submit
from jobs.train import pretrain
from pipeline.config.errors import ConfigError, DataError, MomeError, RunFailed, StorageError, TrackingError
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.data.shards.manifest import index_shards
from pipeline.data.storage import Storage
from pipeline.training.checkpoint.weights import save_weights
from pipeline.training.prepare import prepare
from tests.support.data_stream import data_config
from tests.support.pairs import pair, tar_bytes
from tests.support.short_run import DEMO
from tests.support.train_process import ROOT, run_module


def demo(folder: Path, *overrides: str) -> RunConfig:
    """Return the demo's config, shortened, with all paths below `folder`."""
    places = [f"sources.{name}.shards={folder}/scenes" for name in ("scenes", "pictures", "sentences")]
    small = ["sources.scenes.synthetic.scenes=60", "sources.unseen.synthetic.scenes=10"]
    return load_config(
        DEMO, [f"output={folder}/runs", f"sources.unseen.shards={folder}/unseen", *places, *small, *overrides]
    )


def refuse(config: RunConfig, kind: type[MomeError] = DataError, status: int = 1) -> str:
    with pytest.raises(kind) as error:
        pretrain(config, RunDisplay(config.name), Interrupts(config))
    assert error.value.exit_status == status
    return str(error.value)


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # as where it is not installed
import mome
try:
    mome.train("demo", ["output=runs"])
except mome.ConfigError as error:
    print(error)
"""


def test_training_without_ray_names_what_to_install_before_anything_is_written(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert "pip install 'mome[ray]'" in done.stdout
    assert "torchrun" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_command_line_ends_with_status_2_and_one_message(tmp_path: Path) -> None:
    done = run_module("jobs.cli", "train", str(DEMO), "model.widht=3", f"output={tmp_path}/runs")
    assert done.returncode == 2
    assert "model.widht: unknown key; did you mean 'width'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_missing_and_empty_data_other_widths_changed_keys_and_local_folders_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "0.tar").write_bytes(tar_bytes({}))
    index_shards(Storage(), f"{tmp_path}/empty")
    for name, expected in (("empty", "empty: its shards have no samples"), ("nowhere", f"{tmp_path}/nowhere")):
        assert expected in refuse(demo(tmp_path, f"sources.pictures.shards={tmp_path}/{name}"))
    assert not (tmp_path / "runs" / "demo" / "run.json").exists()
    narrow = demo(tmp_path, "model.width=64", "name=narrow")
    metadata = {"config": narrow.model_dump(mode="json"), "stage": "vision", "step": 1}
    vocabulary = list(prepare(narrow, Storage()).tokens)
    save_weights(Storage(), f"{narrow.folder}/stages/0-vision", {}, vocabulary, metadata)
    message = refuse(demo(tmp_path, f"stages.language.start_from={narrow.folder}"), ConfigError, status=2)
    assert "width 64 there, 128 here" in message
    prepare(demo(tmp_path), Storage())
    overrides = ("stages.vision.masking.image_mask_ratio=0.7", "seed=8", "cluster.workers=1")
    message = refuse(demo(tmp_path, *overrides), ConfigError, status=2)
    assert "stages.0.masking.image_mask_ratio: was 0.4, now 0.7" in message
    assert "seed: was 7, now 8" in message
    assert "cluster.workers" not in message
    shard = sorted((tmp_path / "scenes").glob("*.tar"))[0]
    shard.unlink()
    assert shard.name in refuse(demo(tmp_path))
    with pytest.raises(ConfigError, match=r"sources\.scenes\.shards"):
        submit(load_config(DEMO), "http://head:8265", follow=False)


@pytest.mark.timeout(300)
def test_unreachable_service_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    no_server = demo(tmp_path, "tracking.uri=http://127.0.0.1:9")
    assert "tracking.required=false" in refuse(no_server, TrackingError)
    assert not (tmp_path / "runs").exists()
    store = "storage={endpoint_url: 'http://127.0.0.1:9', retry_timeout_seconds: 3}"
    no_store = demo(tmp_path, "sources.pictures.shards=s3://nowhere/pictures", store)
    assert "s3://nowhere/pictures" in refuse(no_store, StorageError)
    no_cluster = demo(tmp_path, "cluster.address='127.0.0.1:9'")
    assert "cluster.address 127.0.0.1:9" in refuse(no_cluster, RunFailed)


def test_corrupt_jpegs_are_replaced_and_a_non_finite_loss_stops_the_run_by_name(tmp_path: Path) -> None:
    samples = {f"{number:04d}": pair(number) for number in range(40)}
    for key in ("0003", "0017"):
        samples[key]["jpg"] = samples[key]["jpg"][: len(samples[key]["jpg"]) // 2]
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(tar_bytes(samples))
    index_shards(Storage(), f"{tmp_path}/tars")
    stage, data = {"name": "vision", "steps": 6, "global_batch_size": 8}, {"streams": 2, "max_bad_rate": 0.2}
    settings = {"name": "tiny", "output": f"{tmp_path}/runs", "engine": {"precision": "float32"}}
    run = data_config({"pairs": f"{tmp_path}/tars"}, ["mim"], "images", data=data, stage=stage, **settings)
    (config := tmp_path / "run.yaml").write_text(run.model_dump_json(), encoding="utf-8")
    done = run_module("pipeline.training", str(config))
    assert done.returncode == 0, done.stderr
    lines = [line for file in (tmp_path / "runs/tiny/quarantine").glob("*.jsonl") for line in file.open()]
    records = [json.loads(line) for line in lines]
    assert {record["key"] for record in records} == {"0003", "0017"}  # 48 samples: one epoch of 40 and a little more
    assert all(record["stage"] == "image" and record["shard"] == "0.tar" for record in records)
    optimizer = "stages.vision.optimizer={lr: 1e30, warmup_steps: 0, lr_schedule: constant}"
    done = run_module("pipeline.training", str(config), "name=diverging", "tracking.metrics_every=1", optimizer)
    assert done.returncode == 1
    assert all(text in done.stderr for text in ("stage vision, step", "optimizer.lr"))
    assert "is nan" in done.stderr or "is inf" in done.stderr


@pytest.mark.slow
def test_trials_of_a_recipe_overfit_few_samples_and_suggest_a_rate_without_touching_the_run(tmp_path: Path) -> None:
    places = [f"sources.{name}.shards={tmp_path}/scenes" for name in ("scenes", "pictures", "sentences")]
    places += [
        f"sources.unseen.shards={tmp_path}/unseen",
        f"output={tmp_path}/runs",
        "sources.scenes.synthetic.scenes=60",
    ]
    command = ("jobs.cli", "train", str(DEMO), *places, "--stage", "vision", "--json")
    done = run_module(*command, "--overfit", "4", "--trial-steps", "80")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["learns"]
    assert (result["stage"], result["steps"]) == ("vision", 80)
    assert result["last"]["mim"] < 0.2 * result["first"]["mim"]
    done = run_module(*command, "--overfit", "4", "--trial-steps", "20", "stages.vision.optimizer.lr=1e-9")
    assert done.returncode == 1, "a recipe that does not learn"
    done = run_module(*command, "--lr-range", "1e-6:1e-1", "--trial-steps", "40")
    assert done.returncode == 0, done.stderr
    assert 1e-6 < json.loads(done.stdout.splitlines()[-1])["lr"] < 1e-1
    assert not (tmp_path / "runs").exists()


PROGRAM = """
import jobs.train
from jobs.configs import fingerprint_of
from pipeline.config.load import RECIPES, load_config
small = ['sources.scenes.synthetic.scenes=60', 'sources.unseen.synthetic.scenes=10']
config = load_config('demo', small)
print(jobs.train.__file__, RECIPES, fingerprint_of(config, None, '0:1', 1, 0, 1)['steps'])
"""
API = """
import sys, mome
assert not {'torch', 'jobs', 'pipeline'} & sys.modules.keys()
assert mome.load and mome.TrainedModel and mome.ConfigError
print(mome.__file__, *sorted({'jobs', 'typer', 'rich', 'jinja2', 'ray', 'mlflow'} & sys.modules.keys()))
"""


def build_wheel(folder: Path) -> Path:
    """Build the project's wheel in a folder; skip the test where pip reaches no package index."""
    source = folder / "source"
    for name in ("pipeline", "jobs", "configs"):  # a copy: pip builds in the source folder and would reuse older builds
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if built.returncode and "setuptools" in built.stderr and "No matching distribution" in built.stderr:
        pytest.skip("pip cannot reach a package index for setuptools, which builds the wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("mome-*.whl")
    return wheel


def test_wheel_has_all_recipes_and_modules_and_runs_the_demo_and_the_python_api(tmp_path: Path) -> None:
    installed, empty = tmp_path / "site", tmp_path / "empty"
    with zipfile.ZipFile(build_wheel(tmp_path)) as archive:
        archive.extractall(installed)
    api = ROOT / "jobs" / "api"
    for folder, target in (
        ("configs", "mome/configs"),
        ("pipeline", "pipeline"),
        ("jobs", "jobs"),
        ("jobs/api", "mome"),
    ):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".yaml", ".py", ".j2", ".typed")]
        own = [path for path in files if folder == "jobs/api" or api not in path.parents]
        assert [f for f in own if not (installed / target / f.relative_to(ROOT / folder)).is_file()] == []

    empty.mkdir()
    environment, printed = {**os.environ, "PYTHONPATH": str(installed)}, []
    for program in (API, PROGRAM):
        options = {"cwd": empty, "env": environment, "timeout": 120, "check": False}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.split(maxsplit=2))
    (api,), (demo, configs, steps) = printed  # the Python API needs no command line
    assert Path(api) == installed / "mome" / "__init__.py"
    assert Path(demo).is_relative_to(installed)
    assert (Path(configs), steps.strip()) == (installed / "mome" / "configs", "[0, 1]")
    assert (empty / "runs" / "demo-data" / "scenes" / "manifest.json").is_file()


TINY = [f"stages.{name}.steps=2" for name in ("vision", "language", "vision_language")]
TINY += ["sources.scenes.synthetic.scenes=60", "sources.unseen.synthetic.scenes=20"]
TRAIN = f"""
import mome
run = mome.train("demo", ["name=small", *{TINY}])
assert run.folder == "runs/small" and 0 <= run.metrics["retrieval"]["image_to_text"]["r1"] <= 1, run
print(mome.load(run).encode_text("a red circle").norm())
"""


@pytest.mark.slow
def test_wheel_trains_and_serves_in_a_fresh_environment(tmp_path: Path) -> None:
    """Dependencies come from the environment of the tests; nothing else of the checkout is on any path."""
    wheel, fresh, empty = build_wheel(tmp_path), tmp_path / "fresh", tmp_path / "empty"
    shutil.rmtree(tmp_path / "source")
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", fresh], check=True)
    python, command = fresh / "bin" / "python", fresh / "bin" / "mome"
    (packages,) = fresh.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=False, cwd=empty, env=environment, timeout=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    assert "mome " in run(command, "--version")
    assert "Usage: mome [OPTIONS]" in run(command, "-h")
    assert "Usage: mome train" in run(command, "train", "-h")
    assert "finetune/vilt_b32_vqa" in run(command, "config", "list")
    result = json.loads(run(command, "demo", *TINY, "--json").splitlines()[-1])
    assert (empty / result["checkpoint"]).is_dir()
    assert (empty / result["report"]).is_file()
    assert abs(float(re.findall(r"[\d.]+", run(python, "-c", TRAIN).splitlines()[-1])[0]) - 1) < 1e-3
