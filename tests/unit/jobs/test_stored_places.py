"""A folder of others decides neither which servers are contacted nor which files are opened; readers write nothing."""

import json
import select
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from PIL import Image
from typer.testing import CliRunner

import jobs.tracking
from jobs.cli import app, named_caller
from jobs.configs import URI_VARIABLE, Caller
from pipeline.config.errors import ConfigError, MomeError
from pipeline.config.load import check_stored_url, stored_config
from pipeline.data.storage import Storage
from pipeline.training.prepare import prepare
from tests.support.finished_run import config_of, contents, draw, untrained_weights, write_run


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("drawn") / "scenes")


@pytest.fixture
def observer(tmp_path):
    """Open a port, which is readable once anything connects to it, and record the files opened in a guarded folder."""
    (guarded := tmp_path / "guarded").mkdir()
    (guarded / "secret").write_text("hunter2", encoding="utf-8")
    server = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{server.getsockname()[1]}"
    watching = SimpleNamespace(guarded=str(guarded), address=address, server=server, active=True, opened=[])

    def audit(event, arguments):
        if watching.active and event in ("open", "os.listdir", "os.scandir"):
            path = str(arguments[0])
            watching.opened += [path] if path.startswith(watching.guarded) else []

    sys.addaudithook(audit)  # audit hooks cannot be removed: inactive once `active` is False
    yield watching
    watching.active = False
    server.close()


@pytest.fixture
def hostile(tmp_path, shards, observer, monkeypatch):
    """Write a run that names foreign servers, and secrets and files of its reader."""
    monkeypatch.setenv("CANARY", "hunter2")
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    server, secret = f"http://{observer.address}", f"{observer.guarded}/secret"
    storage = {"endpoint_url": server, "key": "env:CANARY", "secret": f"file:{secret}", "retry_timeout_seconds": 1.0}
    sources = {"pairs": {"shards": shards}, "beacon": {"shards": f"{server}/shards"}}
    named = {"tracking": {"uri": server}, "cluster": {"address": f"ray://{observer.address}"}, "storage": storage}
    recorded = config_of(Path(observer.guarded), sources, "pairs", tokenizer={"vocabulary": secret}, **named)
    stage = recorded.stages[0].model_copy(update={"start_from": secret, "sources": {"pairs": 1.0, "beacon": 1.0}})
    return write_run(tmp_path / "theirs", recorded.model_copy(update={"stages": (stage,)}), shards)


USING = [
    "report {run}", "compare {run} {run} --html {out}/compare.html", "sync {run}", "evaluate {run}",
    "evaluate {run} --source beacon", "evaluate {run} --against {run}", "predict {run} --image {image} --text circle",
    "explain {run} --image {image} --text circle --out {out}/e.html", "register {run} --name theirs",
    "embed {shards} --checkpoint {run} --out {out}/vectors",
    "export {run} --format safetensors --out {out}/w.safetensors",
]  # fmt: skip
REFUSED = {"sync {run}", "evaluate {run} --source beacon"}


def test_commands_use_no_server_secret_or_file_named_by_a_folder(hostile, shards, tmp_path, observer, monkeypatch):
    values = json.loads(Path(hostile, "run.json").read_text(encoding="utf-8"))
    config, recorded = stored_config(values, "run.json", hostile)
    assert config.folder == hostile
    assert (recorded.folder, recorded.tracking_uri) == (f"{observer.guarded}/run", f"http://{observer.address}")
    used = Caller().applied(config)
    places = (used.storage.endpoint_url, used.storage.key, used.storage.secret, used.tracking.uri, used.cluster.address)
    assert places == (None,) * 5
    register = Mock(return_value={"name": "theirs", "version": 1, "alias": None, "uri": "models:/theirs/1"})
    monkeypatch.setattr(jobs.tracking, "register", register)
    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    observer.opened.clear()
    for command in USING:
        words = command.format(run=hostile, shards=shards, image=tmp_path / "image.png", out=tmp_path)
        result = CliRunner().invoke(app, words)
        assert (result.exit_code == 0) == (command not in REFUSED), (command, result.output, result.exception)
        assert result.exit_code == 0 or isinstance(result.exception, MomeError), (command, result.exception)
    assert select.select([observer.server], [], [], 0)[0] == [], "a command connected to a foreign server"
    assert observer.opened == []
    assert [call.args[0] for call in register.call_args_list] == [f"sqlite:///{tmp_path}/mlflow.db"]
    assert sorted(path.name for path in Path(observer.guarded).iterdir()) == ["secret"]
    journal = b"".join(path.read_bytes() for path in Path(hostile, "journal").glob("*.jsonl"))
    assert journal.count(b'"kind":"run"') == 1  # nothing was recorded


def test_stored_urls_name_no_host_and_only_stored_config_parses_configs_of_runs():
    for url in ("/data/shards", "file:///data/shards", "s3://bucket/shards", "gs://bucket/shards"):
        check_stored_url(url, "sources.x.shards")
    chained = ("simplecache::http://host/shards", "zip://a.zip::https://host/b")
    for url in ("http://host/shards", "HTTPS://host/shards", "ftp://host/shards", "sftp://host/shards", *chained):
        with pytest.raises(ConfigError):
            check_stored_url(url, "sources.x.shards")
    root = Path(__file__).resolve().parents[3]
    files = [*root.glob("pipeline/**/*.py"), *root.glob("jobs/**/*.py")]
    parsing = {str(f.relative_to(root)) for f in files if "RunConfig.model_validate" in f.read_text(encoding="utf-8")}
    # jobs/distributed.py receives a config from the driver, which read it from a file.
    assert parsing == {"pipeline/config/load.py", "jobs/distributed.py"}


def test_caller_settings_come_from_the_config_it_names(tmp_path, monkeypatch):
    own = config_of(tmp_path, {"pairs": {"shards": "/data"}}, "pairs", tracking={"uri": "http://own:5000"})
    (tmp_path / "own.yaml").write_text(own.model_dump_json(), encoding="utf-8")
    monkeypatch.setenv(URI_VARIABLE, "http://environment:5000")
    assert Caller().server == named_caller(None).server == "http://environment:5000"
    for config in (None, tmp_path / "own.yaml"):
        assert named_caller(config, "http://argument:5000").server == "http://argument:5000"
    assert named_caller(tmp_path / "own.yaml").server == "http://own:5000"


@pytest.mark.parametrize(("name", "part"), [("run", ""), ("renamed run", "stages/0-pairs")])
def test_results_are_written_next_to_the_given_weights(shards, tmp_path, name, part, monkeypatch):
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    original, copy = tmp_path / "runs" / "run", tmp_path / "elsewhere" / name
    write_run(original, config_of(tmp_path / "runs", {"pairs": {"shards": shards}}, "pairs"), shards)
    shutil.copytree(original, copy)
    before = contents(tmp_path / "runs")
    result = CliRunner().invoke(app, ["evaluate", str(copy / part), "--json"])
    assert result.exit_code == 0, result.output
    assert Path(json.loads(result.stdout.splitlines()[-1])["report"]) == copy / "evaluation-pairs.html"
    assert not (tmp_path / "elsewhere" / "mlflow.db").exists()
    assert "it is a copy of" in result.stderr
    for command in (["compare", str(copy), str(original), "--json"], ["report", str(copy)]):
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == 0, shown.output
    written = {"evaluation-pairs.html", "evaluation.html", "evaluations/pairs-pairs.json", "run_report.html"}
    assert written <= contents(copy).keys()
    assert contents(tmp_path / "runs") == before


READING = [
    "fingerprint {out}/run.yaml --steps 0:1", "plan {out}/run.yaml", "doctor --config {out}/run.yaml",
    "fingerprint {out}/run.yaml data.loader.threads_per_worker=3 --steps 0:1 --workers 1",
    "predict {folder}/run --image {out}/image.png --text circle", "predict {weights} --text [MASK]",
    "explain {folder}/run --image {out}/image.png --text circle --out {out}/explained.html",
    "embed {folder}/scenes --checkpoint {folder}/run --out {out}/vectors",
    "export {folder}/run --format safetensors --out {out}/weights.safetensors",
    "compare {folder}/run {folder}/run --html {out}/compared.html",
    "shards show {folder}/scenes --sheet {out}/sheet.png",
    "shards check {folder}/scenes --report {out}/bad.jsonl --workers 1",
]  # fmt: skip


def test_a_command_that_reads_changes_nothing(tmp_path):
    folder, out = tmp_path / "runs", tmp_path / "outside"
    out.mkdir()
    config, weights = untrained_weights(folder)
    prepare(config, Storage())
    (out / "run.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    Image.new("RGB", (30, 20), "red").save(out / "image.png")
    before = contents(folder)
    for command in READING:
        words = command.format(folder=folder, out=out, weights=weights).split()
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code in ((0, 1) if command.startswith("doctor") else (0,)), (command, result.output)
        assert contents(folder) == before, command
