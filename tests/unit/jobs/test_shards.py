"""`mome shards` on foreign tars: names in any encoding, links, damaged members."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.errors import ConfigError, MomeError
from pipeline.data.shards.tar import clean_name
from tests.support.shards_command import facts_of, run_shards

NAME = b"caf\xe9"


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
    assert facts_of("index", folder)["num_samples"] == 2
    assert "2 x symbolic link (the first: link.jpg)" in caplog.text
    facts = facts_of("check", folder, "--workers", 1, "--report", tmp_path / "bad.jsonl", status=3)
    assert (facts["bad_samples"], facts["skipped"]) == (1, {"symbolic link": 2})
    (bad,) = map(json.loads, (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines())
    assert bad["key"] == "cut"
    assert "lone surrogate" in bad["reason"]
    printed = run_shards("check", folder, "--workers", 1, status=3).stdout
    assert "skipped, not part of a sample: symbolic link" in printed
    shown = facts_of("show", folder, "--sheet", tmp_path / "sheet.png")["samples"]
    assert [sample["key"] for sample in shown] == [clean_name(NAME), "cut"]
    run_shards("show", folder).stdout.encode()


@pytest.mark.parametrize(("command", "option"), [("check", "--report"), ("show", "--sheet")])
def test_output_replaces_only_an_older_output(folder: Path, tmp_path: Path, command: str, option: str) -> None:
    run_shards("index", folder)
    place, workers = tmp_path / "out", ["--workers", 1] if command == "check" else []
    for _ in range(2):
        run_shards(command, folder, option, place, *workers, status=3 if command == "check" else 0)
    for foreign in (b"mine", b'{"image": "a.jpg"}\n', (folder / "0.tar").read_bytes()):
        place.write_bytes(foreign)
        refused = run_shards(command, folder, option, place, *workers, fails=ConfigError)
        assert re.search(rf"{option}.*did not write", str(refused.exception))
        assert place.read_bytes() == foreign
    refused = run_shards(command, folder, option, folder, *workers, fails=MomeError)
    assert re.search("[Ff]older|[Dd]irectory", str(refused.exception))
