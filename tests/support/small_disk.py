"""A small file system, and what fills it, for tests of full disks."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a file system of 8 MiB; yield None where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "mome-test", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def fill_disk(file: Path) -> None:
    """Append to a file until its file system is full."""
    with suppress(OSError), file.open("ab", buffering=0) as stream:
        while True:
            stream.write(bytes(2**12))
