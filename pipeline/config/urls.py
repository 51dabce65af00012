"""URLs of files and folders; a malformed one, such as `s3:/bucket/x`, is an error and never names a local folder."""

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
    """Return protocol and path in its backend's form. Raises ConfigError if malformed, or if it would run a program."""
    protocol, separator, rest = url.partition("://")
    authority, fault, instead = rest.partition("/")[0], "", ""  # what is wrong, and the correct form
    forms = () if separator else (_ONE_SLASH, _NO_SLASH, _NO_COLON, _INSIDE)
    if _RUNS_SOMETHING.search(url):
        fault = (
            "this URL runs a program when it is read, which is not allowed for data; give the location of the files: "
        )
        fault += "a folder, s3://bucket/folder or another storage URL"
    elif not url.strip():
        fault = "the URL is empty; give a folder, s3://bucket/folder or another storage URL"
    elif _CONTROL.search(url):
        fault, instead = "it contains a line break or another control character", _CONTROL.sub("", url).strip()
    elif url != url.strip():
        fault, instead = "it begins or ends with a space", url.strip()
    elif template := _TEMPLATE.search(url):
        fault = f"{template.group()} is not expanded here; write its value, or let the shell expand it on the command "
        fault += 'line: output="$SCRATCH/runs"'
    elif not separator and _DRIVE.match(url):
        fault = "Windows paths are not supported; give a path of this system"
    elif match := next(filter(None, (form.fullmatch(url) for form in forms)), None):
        word, path = match["word"].lower(), match["rest"].replace("\\", "/").lstrip("/")
        fault = f"this would be a local folder named '{match['word']}'"
        instead = f"file:///{path}" if word == "file" else f"{word}://{path}"
    elif not separator and ("/~/" in url or url.endswith("/~")):
        fault, instead = "~ means the home folder only at the beginning", f"~{url.rpartition('/~')[2]}"
    elif separator and not _PROTOCOL.fullmatch(protocol):
        meant = re.sub(r"[^a-z0-9+-]", "", protocol.rpartition("/")[2].rpartition(":")[2].lower())
        fault, instead = "the text before :// is not a protocol", f"{meant or 's3'}://{rest}"
    elif separator and protocol == "file" and not rest.startswith(("/", "~")):
        fault, instead = "a file URL has three slashes", f"file:///{rest.removeprefix('localhost/')}"
    elif separator and protocol in _STORES and not authority:
        fault, instead = "it names no bucket or host", f"{protocol}://{rest.strip('/') or 'bucket/folder'}"
    elif separator and protocol in ("s3", "s3a") and "@" in authority:
        bucket = authority.rpartition("@")[2]
        url = f"s3://…@{bucket}"
        fault = f"an S3 URL must not contain keys; give s3://{bucket}/folder, and the keys as storage.key and "
        fault += "storage.secret ('env:NAME' or 'file:PATH') or as AWS_ variables"
    if fault:
        raise ConfigError(f"{url!r}: {fault}" + (f"; give {instead!r}" if instead else ""))
    if separator and protocol != "file":
        return ("s3", rest.strip("/")) if protocol in ("s3", "s3a") else (protocol, url)
    path = rest if separator else url
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise ConfigError(f"{path!r}: the home folder of {user!r} is unknown; set HOME, or give a path without '~'")
    return "file", expanded


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
