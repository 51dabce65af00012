"""URLs of files and folders put together and taken apart."""

from __future__ import annotations


def join(url: str, *parts: str) -> str:
    """The URL of something inside the folder `url`."""
    return "/".join([url.rstrip("/") or "", *(part.strip("/") for part in parts)])


def split(url: str) -> tuple[str, str]:
    """The folder of a URL and the name inside it."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return (folder or ("/" if url.startswith("/") else ".")), name
