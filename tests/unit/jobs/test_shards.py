"""`mome shards` on foreign tars: names in any encoding, links, damaged members."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.shards import app
from pipeline.data.shards.tar import clean_name

NAME = b"caf\xe9"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.stdout


@pytest.fixture
def folder(tmp_path: Path, make_pair: Any) -> Path:
    """Pack a pair with a Latin-1 name, one whose caption ends in half an emoji, and a pair of symbolic links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for key, members in {"café": make_pair(0), "cut": make_pair(1) | {"json": b'{"caption": "a \\ud83d"}'}}.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for extension in ("jpg", "json"):
            info = tarfile.TarInfo(f"link.{extension}")
            info.type, info.linkname = tarfile.SYMTYPE, f"elsewhere.{extension}"
            tar.addfile(info)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").write_bytes(buffer.getvalue())
    return tmp_path / "shards"


def test_index_check_and_show_print_clean_text(folder: Path, tmp_path: Path, caplog: Any) -> None:
    status, out = run("index", folder, "--json")
    assert status == 0
    assert json.loads(out.splitlines()[-1])["num_samples"] == 2
    assert "2 x symbolic link (the first: link.jpg)" in caplog.text
    status, out = run("check", folder, "--json", "--workers", 1, "--report", tmp_path / "bad.jsonl")
    facts = json.loads(out.splitlines()[-1])
    assert (status, facts["bad_samples"], facts["skipped"]) == (3, 1, {"symbolic link": 2})
    (bad,) = map(json.loads, (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines())
    assert bad["key"] == "cut"
    assert "lone surrogate" in bad["reason"]
    assert "skipped, not part of a sample: symbolic link" in run("check", folder, "--workers", 1)[1]
    status, out = run("show", folder, "--json", "--sheet", tmp_path / "sheet.png")
    shown = json.loads(out.splitlines()[-1])["samples"]
    assert [sample["key"] for sample in shown] == [clean_name(NAME), "cut"]
    assert run("show", folder)[0] == 0
    out.encode()


@pytest.mark.parametrize(("command", "option"), [("check", "--report"), ("show", "--sheet")])
def test_output_replaces_only_an_older_output(folder: Path, tmp_path: Path, command: str, option: str) -> None:
    run("index", folder)
    place, workers = tmp_path / "out", ["--workers", 1] if command == "check" else []
    for _ in range(2):
        assert run(command, folder, option, place, *workers)[0] in (0, 3)
    for foreign in (b"mine", b'{"image": "a.jpg"}\n', (folder / "0.tar").read_bytes()):
        place.write_bytes(foreign)
        with pytest.raises(AssertionError, match=rf"ConfigError.*{option}.*did not write"):
            run(command, folder, option, place, *workers)
        assert place.read_bytes() == foreign
    with pytest.raises(AssertionError, match=r"(ConfigError|StorageError).*([Ff]older|[Dd]irectory)"):
        run(command, folder, option, folder, *workers)
