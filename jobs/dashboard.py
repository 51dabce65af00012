"""A cluster's dashboard, where jobs are submitted over HTTP: whether it may be trusted with one, and how it lets us in.

A Ray dashboard without authentication runs whatever anyone sends it, so that one is used on this machine alone. The
token of one with authentication is named, never given: by `--token env:NAME` or `--token file:PATH`, or by Ray's own
RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline.config.errors import ConfigError, RunFailed
from pipeline.config.load import resolve_secret

TOKEN_FILE = Path("~/.ray/auth_token")
ANSWER_SECONDS = 20.0
REFUSED = (401, 403)
GIVE_TOKEN = (
    "Name the cluster's token: --token file:PATH or --token env:NAME, or RAY_AUTH_TOKEN_PATH, or put it into "
    "~/.ray/auth_token."
)


def open_dashboard(address: str, token: str | None = None) -> Any:
    """Ray's JobSubmissionClient of the dashboard at `address`; `token` is a reference. Nothing is sent before it is
    known that the cluster asks everyone for a token, or is on this machine.

    Raises ConfigError for an address that must not be used, RunFailed when it does not answer or does not let us in.
    """
    if not address:
        raise ConfigError("--address: give the cluster's dashboard, such as http://head:8265")
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    if urlparse(address).scheme not in ("http", "https"):
        raise ConfigError(f"--address {address}: expected the cluster's dashboard, such as http://head:8265")
    secret = find_token(token)
    guarded = _answer(address, None) in REFUSED
    if not guarded and not is_loopback(address):
        raise ConfigError(
            f"--address {address}: refused, because it lets anyone run code there. Start the cluster with "
            "RAY_AUTH_MODE=token and a token on every node, or open a tunnel to it and give this machine's end of it."
        )
    if guarded and secret is None:
        raise RunFailed(f"--address {address}: the cluster asks for a token, and none is known here. {GIVE_TOKEN}")
    if guarded and _answer(address, secret) in REFUSED:
        raise RunFailed(f"--address {address}: the cluster does not accept the token. {GIVE_TOKEN}")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address, headers=_headers(secret) if guarded else None)
    except (ConnectionError, RuntimeError) as error:
        raise RunFailed(f"--address {address}: the dashboard takes no jobs ({first_line(error)})") from error


def find_token(reference: str | None) -> str | None:
    """The token behind `env:NAME` or `file:PATH`, else where Ray looks for it; None if there is none."""
    if reference is not None:
        if not reference.startswith(("env:", "file:")):
            raise ConfigError("--token: is a secret and must be a reference: env:NAME or file:PATH")
        return resolve_secret(reference)
    if "RAY_AUTH_TOKEN" in os.environ:
        return os.environ["RAY_AUTH_TOKEN"].strip()
    if "RAY_AUTH_TOKEN_PATH" in os.environ:
        return resolve_secret(f"file:{os.environ['RAY_AUTH_TOKEN_PATH']}")
    file = TOKEN_FILE.expanduser()
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def is_loopback(address: str) -> bool:
    host = urlparse(address if "://" in address else f"http://{address}").hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _answer(address: str, secret: str | None) -> int:
    """The status with which the list of jobs is given, or refused, to who holds the token, or to anyone."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers=_headers(secret))
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        raise RunFailed(
            f"--address {address}: no Ray dashboard answers there ({error}). Start a head with "
            "`ray start --head`, or open a tunnel to the cluster's port 8265."
        ) from error


def _headers(secret: str | None) -> dict[str, str]:
    return {} if secret is None else {"Authorization": f"Bearer {secret}"}


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
