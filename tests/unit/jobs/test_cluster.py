"""Joining or starting Ray: every failure is one message within seconds, and nothing is accessible to other users."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs import cluster
from jobs.cluster import address_of, connect, host_and_port, keep_token_private, private_folder
from pipeline.config.errors import RunFailed
from pipeline.config.schema import ClusterConfig


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove Ray's environment variables and fail the test if it starts or joins Ray."""
    import ray

    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked to connect"))


def joined(address: str) -> str:
    """Return the error message of connecting to this address."""
    with pytest.raises(RunFailed) as error:
        connect(ClusterConfig(address=address))
    return str(error.value)


@pytest.mark.parametrize(
    ("named", "variable", "expected"),
    [
        (None, None, None),
        ("local", None, None),
        (None, "local", None),
        ("head:6379", None, ("head:6379", "cluster.address")),
        ("head:6379", "other:6379", ("head:6379", "cluster.address")),
        (None, "other:6379", ("other:6379", "RAY_ADDRESS")),
        ("auto", "other:6379", ("other:6379", "RAY_ADDRESS")),
        ("auto", None, ("auto", "cluster.address")),
        (None, "", None),
    ],
)
def test_address_is_returned_with_its_origin(
    named: str | None, variable: str | None, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert address_of(ClusterConfig(address=named)) == expected


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("head:6379", ("head", 6379)),
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("[fe80::1%eth0]:6379", ("fe80::1%eth0", 6379)),
    ],
)
def test_hosts_may_be_ipv6_addresses(address: str, expected: tuple[str, int]) -> None:
    assert host_and_port(address) == expected


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "::1:6379", "[::1]", "head:port", "head:99999", "a b:1"])
def test_malformed_host_and_port_are_rejected(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        host_and_port(address)
    assert joined(address).startswith(f"cluster.address {address}: no Ray cluster answers")


def test_errors_of_ray_address_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(RunFailed, match=r"^RAY_ADDRESS http://head:8265: "):
        connect(ClusterConfig())


def test_ray_client_addresses_are_rejected() -> None:
    assert "cannot place ranks" in joined("ray://head:10001")


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    do_PRI = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_port_without_a_ray_head_is_reported_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        assert "is no Ray head" in joined(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    monkeypatch.setattr(cluster, "HEAD_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "is no Ray head" in joined(f"127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_ipv6_head_is_reached() -> None:
    with HTTPServer(("127.0.0.1", 0), _Page, bind_and_activate=False) as server:
        server.address_family = socket.AF_INET6
        server.socket = socket.create_server(("::1", 0), family=socket.AF_INET6)
        server.server_port = server.socket.getsockname()[1]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        assert "is no Ray head" in joined(f"[::1]:{server.server_port}"), "it was not found, though it listens"
        server.shutdown()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /very/long"), "set TMPDIR or RAY_TMPDIR"),
        (Exception("The current node timed out during startup."), "mome doctor"),
        (PermissionError(13, "Permission denied"), "mome doctor"),
    ],
)
def test_local_ray_that_does_not_start_is_one_message(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(RunFailed, match=f"Ray did not start on this machine .*{told}"):
        connect(ClusterConfig())


def test_token_is_private_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".ray" / "auth_token"
    keep_token_private()
    token = file.read_text()
    assert len(token) == 64
    assert [stat.S_IMODE(each.stat().st_mode) for each in (file, file.parent)] == [0o600, 0o700]
    file.chmod(0o644)
    keep_token_private()
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (token, 0o600), "and a token there stays"
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("home", ["/dev/null", "/proc/no-such"])
def test_read_only_home_needs_no_token_file(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    keep_token_private()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_temporary_files_are_in_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = private_folder("mome-ray-train")
    assert folder == private_folder("mome-ray-train")
    os.chmod(folder, 0o755)
    assert stat.S_IMODE(os.stat(private_folder("mome-ray-train")).st_mode) == 0o700
    os.rmdir(folder)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", folder)
    assert private_folder("mome-ray-train") != folder, "a foreign symbolic link was followed"
