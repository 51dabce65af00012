"""Where DeepSpeed's C++ extensions are built and loaded, and by one process of the node at a time.

torch guards a build by a file that only the process that made it deletes: kill that process in the wrong second, and
every later run on the machine waits for it for ever. So extensions lie in a folder of our own, a lock of the kernel's
stands before torch's, and whoever holds it knows that a lock file it finds was left by the dead.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from pipeline.config.errors import ConfigError

log = logging.getLogger(__name__)

FOLDER = "TORCH_EXTENSIONS_DIR"  # torch's own variable; a folder that the user named is used as it is


def use_own_ninja() -> None:
    """Puts this installation's ninja before any other of the machine, whatever PATH the process was started with.

    Two versions of it find each other's builds out of date, and build anew every time.
    """
    scripts = sysconfig.get_path("scripts")
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if Path(scripts, "ninja").exists() and paths[0] != scripts:
        os.environ["PATH"] = os.pathsep.join([scripts, *paths])


def use_own_folder() -> Path:
    """Tells torch where to build; what is built depends on Python's and torch's versions, and on DeepSpeed's place.

    Two installations that shared a folder would each find the other's build out of date, and build anew every time.
    """
    found = importlib.util.find_spec("deepspeed")
    place = hashlib.sha256(str(found and found.origin).encode()).hexdigest()[:8]
    version = f"mome-py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}-{place}"
    return Path(os.environ.setdefault(FOLDER, str(Path(get_default_build_root()) / version)))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While extensions are built or loaded in `folder`. A process that is killed in here is in nobody's way.

    Raises ConfigError for a folder that cannot be written, such as one below a home that is none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "mome.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            f"DeepSpeed's operators cannot be built in {folder} ({error.strerror}); set {FOLDER} to a folder that can "
            "be written and run from"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s); do not start two first runs at once", folder, error.strerror)
        else:
            for left in folder.glob("*/lock"):
                left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
