"""A folder written by others determines neither which servers are contacted nor which files are opened.

Commands that only read write nothing into a run, its weights or its data, and accept what `mome train` accepts.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import jobs.tracking
from jobs.caller import URI_VARIABLE, Caller
from jobs.cli import app
from pipeline.config.errors import ConfigError, MomeError
from pipeline.config.stored import check_stored_url, stored_config
from pipeline.data.storage import Storage
from pipeline.training.prepare import prepare
from tests.support.finished_run import config_of, contents, draw, untrained_weights, write_run


class Observer:
    """Server that records connections without answering, and the files below a folder that this process opens."""

    def __init__(self, guarded: Path):
        self.guarded, self.active = str(guarded), True
        self.connections: list[Any] = []
        self.opened: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        sys.addaudithook(self._audit)  # audit hooks cannot be removed: inactive once `active` is False

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections.append(connection.recv(100) if self.active else b"")
            connection.close()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in ("open", "os.listdir", "os.scandir"):
            path = str(arguments[0])
            self.opened += [path] if path.startswith(self.guarded) else []

    def close(self) -> None:
        self.active = False
        self._socket.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("drawn") / "scenes")


@pytest.fixture
def observer(tmp_path: Path) -> Iterator[Observer]:
    guarded = tmp_path / "guarded"
    guarded.mkdir()
    (guarded / "secret").write_text("hunter2", encoding="utf-8")
    watching = Observer(guarded)
    yield watching
    watching.close()


@pytest.fixture
def hostile(tmp_path: Path, shards: str, observer: Observer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a run that names foreign servers, and secrets and files of its reader."""
    monkeypatch.setenv("CANARY", "hunter2")
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    server, secret = f"http://{observer.address}", f"{observer.guarded}/secret"
    recorded = config_of(
        Path(observer.guarded),
        {"pairs": {"shards": shards}, "beacon": {"shards": f"{server}/shards"}},
        "pairs",
        storage={"endpoint_url": server, "key": "env:CANARY", "secret": f"file:{secret}", "retry_timeout_seconds": 1.0},
        tracking={"uri": server},
        cluster={"address": f"ray://{observer.address}"},
        tokenizer={"vocabulary": secret},
    )
    stage = recorded.stages[0].model_copy(update={"start_from": secret, "sources": {"pairs": 1.0, "beacon": 1.0}})
    return write_run(tmp_path / "theirs", recorded.model_copy(update={"stages": (stage,)}), shards)


USING = [
    "report {run}",
    "compare {run} {run} --html {out}/compare.html",
    "sync {run}",
    "evaluate {run}",
    "evaluate {run} --source beacon",
    "evaluate {run} --against {run}",
    "predict {run} --image {image} --text circle",
    "explain {run} --image {image} --text circle --out {out}/e.html",
    "embed {shards} --checkpoint {run} --out {out}/vectors",
    "register {run} --name theirs",
    "export {run} --format safetensors --out {out}/w.safetensors",
]
REFUSED = {"sync {run}", "evaluate {run} --source beacon"}


def test_commands_use_no_server_or_file_named_by_a_folder(
    hostile: str, shards: str, tmp_path: Path, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[str] = []

    def register(uri: str, experiment: str, name: str, alias: str | None, **export: Any) -> dict[str, Any]:
        registered.append(uri)
        return {"name": name, "version": 1, "alias": alias, "uri": f"models:/{name}/1"}

    monkeypatch.setattr(jobs.tracking, "register", register)
    Image.new("RGB", (40, 30)).save(tmp_path / "image.png")
    observer.opened.clear()
    for command in USING:
        words = command.format(run=hostile, shards=shards, image=tmp_path / "image.png", out=tmp_path).split()
        result = CliRunner().invoke(app, words)
        assert (result.exit_code == 0) == (command not in REFUSED), (command, result.output, result.exception)
        assert result.exit_code == 0 or isinstance(result.exception, MomeError), (command, result.exception)
    assert observer.connections == []
    assert observer.opened == []
    assert registered == [f"sqlite:///{tmp_path}/mlflow.db"]
    assert sorted(path.name for path in Path(observer.guarded).iterdir()) == ["secret"]
    journal = b"".join(path.read_bytes() for path in Path(hostile, "journal").glob("*.jsonl"))
    assert journal.count(b'"kind":"run"') == 1  # nothing was recorded


def test_stored_config_keeps_no_server_secret_or_location(hostile: str, observer: Observer) -> None:
    values = json.loads(Path(hostile, "run.json").read_text(encoding="utf-8"))
    config, recorded = stored_config(values, "run.json", hostile)
    assert config.folder == hostile
    assert (recorded.folder, recorded.tracking_uri) == (f"{observer.guarded}/run", f"http://{observer.address}")
    used = Caller().applied(config)
    assert (used.storage.endpoint_url, used.storage.key, used.storage.secret) == (None, None, None)
    assert (used.tracking.uri, used.cluster.address) == (None, None)


LOCATIONS = ["/data/shards", "file:///data/shards", "s3://bucket/shards", "gs://bucket/shards"]
HOSTS = ["http://host/shards", "HTTPS://host/shards", "ftp://host/shards", "sftp://host/shards"]
HOSTS += ["simplecache::http://host/shards", "zip://a.zip::https://host/b"]


@pytest.mark.parametrize("url", [*LOCATIONS, *HOSTS])
def test_a_stored_url_names_no_host(url: str) -> None:
    with pytest.raises(ConfigError) if url in HOSTS else nullcontext():
        check_stored_url(url, "sources.x.shards")


def test_only_stored_config_parses_configs_of_runs() -> None:
    root = Path(__file__).resolve().parents[3]
    files = [*root.glob("pipeline/**/*.py"), *root.glob("jobs/**/*.py")]
    parsing = {str(f.relative_to(root)) for f in files if "RunConfig.model_validate" in f.read_text(encoding="utf-8")}
    # jobs/distributed.py receives a config from the driver, which read it from a file.
    assert parsing == {"pipeline/config/load.py", "pipeline/config/stored.py", "jobs/distributed.py"}


def test_caller_settings_come_from_the_config_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = config_of(tmp_path, {"pairs": {"shards": "/data"}}, "pairs", tracking={"uri": "http://own:5000"})
    (tmp_path / "own.yaml").write_text(own.model_dump_json(), encoding="utf-8")
    monkeypatch.setenv(URI_VARIABLE, "http://environment:5000")
    assert Caller().server == Caller.named().server == "http://environment:5000"
    assert Caller.named(uri="http://argument:5000").server == "http://argument:5000"
    assert Caller.named(tmp_path / "own.yaml").server == "http://own:5000"
    assert Caller.named(tmp_path / "own.yaml", "http://argument:5000").server == "http://argument:5000"


# ---- where results go


@pytest.mark.parametrize(("name", "part"), [("run", ""), ("renamed run", "stages/0-pairs")])
def test_results_are_written_next_to_the_given_weights(
    shards: str, tmp_path: Path, name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    original, copy = tmp_path / "runs" / "run", tmp_path / "elsewhere" / name
    write_run(original, config_of(tmp_path / "runs", {"pairs": {"shards": shards}}, "pairs"), shards)
    shutil.copytree(original, copy)
    before = contents(tmp_path / "runs")
    result = CliRunner().invoke(app, ["evaluate", str(copy / part), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout.splitlines()[-1])
    assert Path(values["report"]) == copy / "report-pairs.html"
    assert {"report-pairs.html", "report.html"} <= {path.name for path in copy.iterdir()}
    assert (copy / "evaluations" / "pairs-pairs.json").exists()
    assert contents(tmp_path / "runs") == before
    assert not (tmp_path / "elsewhere" / "mlflow.db").exists()
    assert "it is a copy of" in result.stderr
    for command in (["compare", str(copy), str(original), "--json"], ["report", str(copy)]):
        shown = CliRunner().invoke(app, command)
        assert shown.exit_code == 0, shown.output
    assert (copy / "run_report.html").exists()
    assert contents(tmp_path / "runs") == before


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    """Write a finished run, and its config and an image into a folder for the commands' output."""
    folder, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("outside")
    config, weights = untrained_weights(folder)
    prepare(config, Storage())
    (out / "run.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    Image.new("RGB", (30, 20), "red").save(out / "image.png")
    return {"folder": folder, "out": out, "config": out / "run.yaml", "image": out / "image.png", "weights": weights}


@pytest.mark.parametrize(
    "command",
    [
        "fingerprint {config} --steps 0:1",
        "fingerprint {config} data.loader.threads_per_worker=3 --steps 0:1 --workers 1",
        "plan {config}",
        "doctor --config {config}",
        "predict {folder}/run --image {image} --text circle",
        "predict {weights} --text [MASK]",
        "explain {folder}/run --image {image} --text circle --out {out}/explained.html",
        "embed {folder}/scenes --checkpoint {folder}/run --out {out}/vectors",
        "export {folder}/run --format safetensors --out {out}/weights.safetensors",
        "compare {folder}/run {folder}/run --html {out}/compared.html",
        "shards show {folder}/scenes --sheet {out}/sheet.png",
        "shards check {folder}/scenes --report {out}/bad.jsonl --workers 1",
    ],
)
def test_a_command_that_reads_changes_nothing(places: dict[str, Path], command: str) -> None:
    before = contents(places["folder"])
    result = CliRunner().invoke(app, command.format(**places).split(), catch_exceptions=False)
    assert result.exit_code in ((0, 1) if command.startswith("doctor") else (0,)), result.output
    assert contents(places["folder"]) == before
