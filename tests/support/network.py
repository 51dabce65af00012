"""Several machines with addresses of their own on one: network namespaces joined by a bridge, whose links can be cut.

Needs the right to create network namespaces (root, or CAP_SYS_ADMIN and CAP_NET_ADMIN) and `ip`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.ray_nodes import Host


class Network:
    """A network of `count` machines: the first is this process's own network, the others are namespaces."""

    def __init__(self, count: int):
        self._tag = f"m{os.getpid() % 100000}"
        self._subnet = f"10.{200 + os.getpid() // 250 % 50}.{os.getpid() % 250}"
        self._count = count
        # Gloo would choose the interface by host name, which is the same in every namespace.
        self.hosts = [
            Host(
                f"{self._subnet}.{number + 1}",
                ("ip", "netns", "exec", f"{self._tag}n{number}") if number else (),
                (("GLOO_SOCKET_IFNAME", f"{self._tag}e{number}" if number else f"{self._tag}b"),),
            )
            for number in range(count)
        ]

    def build(self) -> None:
        bridge = f"{self._tag}b"
        _ip(f"link add {bridge} type bridge")
        _ip(f"addr add {self.hosts[0].address}/24 dev {bridge}")
        _ip(f"link set {bridge} up")
        for number in range(1, self._count):
            space, inside, outside = (f"{self._tag}{kind}{number}" for kind in "nev")
            _ip(f"netns add {space}")
            _ip(f"link add {outside} type veth peer name {inside}")
            _ip(f"link set {inside} netns {space}")
            _ip(f"link set {outside} master {bridge} up")
            _ip(f"-n {space} addr add {self.hosts[number].address}/24 dev {inside}")
            _ip(f"-n {space} link set {inside} up")
            _ip(f"-n {space} link set lo up")

    def cut(self, number: int) -> None:
        """Drop all packets of a machine without closing its connections."""
        _ip(f"link set {self._tag}v{number} down")

    def remove(self) -> None:
        for number in range(1, self._count):
            _ip(f"netns del {self._tag}n{number}", check=False)
            _ip(f"link del {self._tag}v{number}", check=False)
        _ip(f"link del {self._tag}b", check=False)


@contextmanager
def network(count: int) -> Iterator[Network | None]:
    """Build the network and yield it; yield None where namespaces are not permitted."""
    machines = Network(count)
    try:
        try:
            machines.build()
        except (OSError, subprocess.CalledProcessError):
            yield None
            return
        yield machines
    finally:
        machines.remove()


def _ip(arguments: str, check: bool = True) -> None:
    if shutil.which("ip") is not None:
        subprocess.run(["ip", *arguments.split()], check=check, capture_output=True)
    elif check:
        raise FileNotFoundError("ip")
