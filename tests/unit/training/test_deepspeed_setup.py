"""DeepSpeed's extensions are built by one process at a time, in a folder of their own, with the installed ninja."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.errors import ConfigError
from pipeline.training.deepspeed_setup import FOLDER, exclusive_build, use_own_folder, use_own_ninja

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.training.deepspeed_setup import exclusive_build
with exclusive_build(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "op").mkdir()
    (Path(sys.argv[1]) / "op" / "lock").touch()
    print("inside", flush=True)
    time.sleep(600)
"""


def test_process_killed_while_building_leaves_no_lock(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "inside\n"
    waiting = HOLDER.replace(".mkdir()", ".mkdir(exist_ok=True)").replace("600", "0")
    waiter = subprocess.Popen([sys.executable, "-c", waiting, str(tmp_path)])
    time.sleep(3)
    assert waiter.poll() is None, "two processes build at once"
    holder.kill()
    holder.wait()
    assert waiter.wait(timeout=60) == 0
    with exclusive_build(tmp_path):
        assert not (tmp_path / "op" / "lock").exists()


def test_ninja_of_this_installation_takes_precedence(monkeypatch: pytest.MonkeyPatch):
    """DeepSpeed depends on ninja, which is therefore installed next to it."""
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))
    use_own_ninja()
    use_own_ninja()
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin", "/bin"]
    assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")


def test_folder_set_by_the_user_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert use_own_folder() == tmp_path
    monkeypatch.delenv(FOLDER)
    assert "mome-py" in use_own_folder().name


def test_two_deepspeed_installations_use_two_folders(monkeypatch: pytest.MonkeyPatch):
    folders = set()
    for origin in ("/here/deepspeed/__init__.py", "/there/deepspeed/__init__.py"):
        monkeypatch.delenv(FOLDER, raising=False)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, origin=origin: SimpleNamespace(origin=origin))
        folders.add(use_own_folder())
    monkeypatch.delenv(FOLDER)
    assert len(folders) == 2


def test_read_only_folder_is_reported_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(ConfigError, match="TORCH_EXTENSIONS_DIR"), exclusive_build(tmp_path / "file" / "extensions"):
        pass


def test_folder_without_file_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "lock").touch()
    with exclusive_build(tmp_path):
        assert (tmp_path / "op" / "lock").exists(), "whose it is cannot be known"
    assert "cannot be locked" in caplog.text
