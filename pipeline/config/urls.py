"""URLs of files and folders: parsing, with a correction in the error message for a URL that is malformed.

A malformed URL would otherwise name a local folder: `s3:/bucket/x`, which pathlib makes of `s3://bucket/x`, or
`${SCRATCH}/runs`, which no shell has expanded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.config.errors import ConfigError

_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "obs", "hf", "http", "https", "ftp", "sftp")
_PROTOCOLS = (*_STORES, "s3n", "adl", "wasb", "wasbs", "hdfs", "webhdfs", "ssh", "smb", "file", "memory", "dbfs")
_ANY = "|".join(_PROTOCOLS)

# webdataset's `pipe:` passes the rest to a shell; fsspec's `reference` expands templates from the file itself.
_RUNS_SOMETHING = re.compile(r"(^|/)pipe:|^reference:|::reference:")
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_TEMPLATE = re.compile(
    r"\$\{[^}]*\}?|\$\(|(?:^|(?<=/))\$[A-Za-z_]\w*|(?:^|(?<=/))%[A-Za-z_]\w*%(?=/|$)|\{\{.*|<[A-Za-z][\w -]*>"
)
_PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*")
_ONE_SLASH = re.compile(r"(?P<word>[A-Za-z][A-Za-z0-9+.-]*):(?P<rest>/.*)", re.DOTALL)
_NO_SLASH = re.compile(rf"(?P<word>{_ANY}):(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_NO_COLON = re.compile(rf"(?P<word>{_ANY})(?P<rest>//.+)", re.IGNORECASE | re.DOTALL)
_INSIDE = re.compile(rf".*/(?P<word>{_ANY}):(?P<rest>/.*)", re.IGNORECASE | re.DOTALL)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def parse(url: str) -> tuple[str, str]:
    """Return the protocol and the path in its backend's form: `~` expanded for files, bucket/key for S3.

    Raises ConfigError for a malformed URL, and for one that would run a program when read.
    """
    if _RUNS_SOMETHING.search(url):
        raise ConfigError(
            f"{url!r}: this URL runs a program when it is read, which is not allowed for data; give the location of "
            "the files: a folder, s3://bucket/folder or another storage URL"
        )
    if not url.strip():
        raise ConfigError(f"{url!r}: the URL is empty; give a folder, s3://bucket/folder or another storage URL")
    if _CONTROL.search(url):
        plain = _CONTROL.sub("", url).strip()
        raise _wrong(url, "it contains a line break or another control character", plain)
    if url != url.strip():
        raise _wrong(url, "it begins or ends with a space", url.strip())
    if template := _TEMPLATE.search(url):
        raise ConfigError(
            f"{url!r}: {template.group()} is not expanded here; write its value, or let the shell expand it on the "
            'command line: output="$SCRATCH/runs"'
        )
    protocol, separator, rest = url.partition("://")
    if not separator:
        if _DRIVE.match(url):
            raise ConfigError(f"{url!r}: Windows paths are not supported; give a path of this system")
        for form in (_ONE_SLASH, _NO_SLASH, _NO_COLON, _INSIDE):
            if match := form.fullmatch(url):
                word, rest = match["word"].lower(), match["rest"].replace("\\", "/").lstrip("/")
                right = f"file:///{rest}" if word == "file" else f"{word}://{rest}"
                raise _wrong(url, f"this would be a local folder named '{match['word']}'", right)
        if "/~/" in url or url.endswith("/~"):
            raise _wrong(url, "~ means the home folder only at the beginning", f"~{url.rpartition('/~')[2]}")
        return "file", _with_home(url)
    if not _PROTOCOL.fullmatch(protocol):
        meant = re.sub(r"[^a-z0-9+-]", "", protocol.rpartition("/")[2].rpartition(":")[2].lower())
        raise _wrong(url, "the text before :// is not a protocol", f"{meant or 's3'}://{rest}")
    if protocol == "file":
        if not rest.startswith(("/", "~")):
            raise _wrong(url, "a file URL has three slashes", f"file:///{rest.removeprefix('localhost/')}")
        return "file", _with_home(rest)
    if protocol in _STORES and not rest.partition("/")[0]:
        raise _wrong(url, "it names no bucket or host", f"{protocol}://{rest.strip('/') or 'bucket/folder'}")
    if protocol not in ("s3", "s3a"):
        return protocol, url
    if "@" in rest.partition("/")[0]:
        bucket = rest.partition("/")[0].rpartition("@")[2]
        raise ConfigError(
            f"s3://…@{bucket}: an S3 URL must not contain keys; give s3://{bucket}/folder, and the keys as storage.key "
            "and storage.secret ('env:NAME' or 'file:PATH') or as AWS_ variables"
        )
    return "s3", rest.strip("/")


def is_local(url: str) -> bool:
    """Return True for a URL of a file or folder on this machine."""
    return parse(url)[0] == "file"


def local_path(url: str) -> Path:
    """Return the absolute path of a local URL. Raises ConfigError for any other."""
    protocol, path = parse(url)
    if protocol != "file":
        raise ConfigError(f"{url!r}: expected a folder or file of this machine; give a local path")
    return Path(path).absolute()


def absolute(url: str) -> str:
    """Return the URL in a form that does not depend on the working folder."""
    return str(local_path(url)) if is_local(url) else url


def file_name_of(name: str) -> str:
    """Return a name from a config or record as a single path component: separators are escaped as %XX."""
    return re.sub(r"[/\\\x00-\x1f\x7f]", lambda match: f"%{ord(match.group()):02X}", name)


def _with_home(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise ConfigError(f"{path!r}: the home folder of {user!r} is unknown; set HOME, or give a path without '~'")
    return expanded


def _wrong(url: str, reason: str, example: str) -> ConfigError:
    return ConfigError(f"{url!r}: {reason}; give {example!r}")
