"""Commands that only read write nothing into a run, its weights or its data, and accept what `mome train` accepts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.data.storage import Storage
from pipeline.training.prepare import prepare
from tests.support.finished_run import untrained_weights


@dataclass(frozen=True)
class Run:
    """Finished run in `folder`, its config as a file, and a separate folder for the commands' output."""

    folder: Path
    config: str
    weights: str
    image: str
    outside: Path

    def contents(self) -> dict[str, tuple[bytes, int]]:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, outside = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("outside")
    config, weights = untrained_weights(folder)
    prepare(config, Storage())
    (outside / "run.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    Image.new("RGB", (30, 20), "red").save(outside / "image.png")
    return Run(folder, str(outside / "run.yaml"), weights, str(outside / "image.png"), outside)


COMMANDS = {
    "fingerprint": "fingerprint {config} --steps 0:1",
    "fingerprint of an override": "fingerprint {config} data.loader.threads_per_worker=3 --steps 0:1 --workers 1",
    "plan": "plan {config}",
    "doctor": "doctor --config {config}",
    "predict": "predict {folder}/run --image {image} --text circle",
    "predict from weights": "predict {weights} --text [MASK]",
    "explain": "explain {folder}/run --image {image} --text circle --out {outside}/explained.html",
    "embed": "embed {folder}/scenes --checkpoint {folder}/run --out {outside}/vectors",
    "export": "export {folder}/run --format safetensors --out {outside}/weights.safetensors",
    "compare": "compare {folder}/run {folder}/run --html {outside}/compared.html",
    "shards show": "shards show {folder}/scenes --sheet {outside}/sheet.png",
    "shards check": "shards check {folder}/scenes --report {outside}/bad.jsonl --workers 1",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_command_that_reads_changes_nothing(run: Run, command: str) -> None:
    before = run.contents()
    result = CliRunner().invoke(app, command.format(**vars(run)).split(), catch_exceptions=False)
    assert result.exit_code in ((0, 1) if command.startswith("doctor") else (0,)), result.output
    assert run.contents() == before
