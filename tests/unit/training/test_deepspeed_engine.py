"""DeepSpeed's extensions are built by one process at a time, in a folder of their own, with the installed ninja."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from pipeline.config.errors import ConfigError
from pipeline.training.deepspeed_engine import FOLDER, exclusive_build, use_own_folder

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.training.deepspeed_engine import exclusive_build
with exclusive_build(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "op").mkdir(exist_ok=True)
    (Path(sys.argv[1]) / "op" / "lock").touch()
    print("inside", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_process_killed_while_building_leaves_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen([*command, "600"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "inside\n"
    waiter = subprocess.Popen([*command, "0"])
    time.sleep(3)
    assert waiter.poll() is None, "two processes build at once"
    holder.kill()
    holder.wait()
    assert waiter.wait(timeout=60) == 0
    with exclusive_build(tmp_path):
        assert not (tmp_path / "op" / "lock").exists()


def test_ninja_and_folder_are_those_of_the_installation_or_the_user(tmp_path, monkeypatch) -> None:
    """DeepSpeed depends on ninja, which is therefore installed next to it."""
    scripts, folders = str(Path(sys.executable).parent), set[Path]()
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert use_own_folder() == use_own_folder() == tmp_path
    assert os.environ["PATH"].split(os.pathsep) == [scripts, "/usr/bin", "/bin"]
    assert shutil.which("ninja") == f"{scripts}/ninja"
    for origin in ("/here/deepspeed/__init__.py", "/there/deepspeed/__init__.py"):
        monkeypatch.delenv(FOLDER)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, origin=origin: SimpleNamespace(origin=origin))
        folders.add(use_own_folder())
    assert len(folders) == 2
    assert all("mome-py" in folder.name for folder in folders)


def test_folder_without_write_access_or_file_locks_is_reported(tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="TORCH_EXTENSIONS_DIR"), exclusive_build(tmp_path / "file" / "extensions"):
        pass
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(37, "No locks available")))
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "lock").touch()
    with exclusive_build(tmp_path):
        assert (tmp_path / "op" / "lock").exists(), "whose it is cannot be known"
    assert "cannot be locked" in caplog.text
