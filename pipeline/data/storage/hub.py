"""Hugging Face's hub (`hf://owner/name[@revision]/path`), through huggingface_hub's file system for fsspec.

That file system keeps listings for the life of the process, reports a repository that may not be read as missing, and
raises each refusal as an OSError, which would be retried. Here listings are fresh, refusals fail at once with the
remedy, and a hub that has not answered before fails after seconds: its address is wrong, or there is no network.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from pipeline.config.redaction import remember
from pipeline.data.storage import FsspecBackend, ObjectInfo, retry

_FIRST_SECONDS = 5.0  # of retries until the hub answers for the first time
_TOKEN_HINT = "set HF_TOKEN to a token that may read the repository, or run `hf auth login`."
_SPELLING_HINT = (
    "Check the spelling; the owner is needed, as in hf://google-bert/bert-base-uncased. "
    f"If it is private, {_TOKEN_HINT}"
)
_OFFLINE_HINT = "Unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, or give the local path of a downloaded folder."
_ENDPOINT_HINT = (
    "Check the network, and HF_ENDPOINT (https://host) if you use a mirror. Without network: download the folder "
    "elsewhere (`hf download owner/name --local-dir FOLDER`), and give its path."
)


class HubBackend(FsspecBackend):
    """Repositories and buckets of the hub at HF_ENDPOINT. An object's tag is its git blob, or the hash in a bucket."""

    retries = True

    def __init__(self, policy: retry.RetryPolicy):
        self.endpoint = (os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT).rstrip("/")
        super().__init__("hf", endpoint=self.endpoint)
        self._policy = policy
        self._has_answered = False
        if token := huggingface_hub.get_token():
            remember(token)

    def read(self, path: str, start: int, stop: int | None, etag: str | None) -> bytes:
        info = self.info(path)  # also refreshes the size that the file system reads up to
        if etag is not None and info.etag != etag:
            raise retry.PreconditionFailed()
        if stop is not None and info.size < stop:
            raise EOFError(retry.TOO_SHORT.format(info.size, start, stop))
        stop = info.size if stop is None else stop
        is_whole = (start, stop) == (0, info.size)  # streamed; ranges are read without the file system's read-ahead
        options = {} if is_whole else {"start": start, "end": stop, "cache_type": "none"}

        def cat() -> bytes:
            data: bytes = self._fs.cat_file(path, **options)
            if len(data) != stop - start:
                raise retry.TransientError(f"{len(data)} bytes arrived for bytes {start} to {stop}")
            return data

        data: bytes = self._call(cat)
        return data

    def info(self, path: str) -> ObjectInfo:
        resolved = self._call(self._fs.resolve_path, path)
        if not resolved.path:
            raise IsADirectoryError(errno.EISDIR, "is a repository, not a file")
        name = resolved.unresolve()
        for item in self._call(self._fs.ls, name.rpartition("/")[0], refresh=True):
            if item["name"] == name:
                if item["type"] == "directory":
                    raise IsADirectoryError(errno.EISDIR, "is a folder, not a file")
                return _info(item)
        raise FileNotFoundError(errno.ENOENT, "no such file in the repository")

    def entries(self, path: str) -> Iterator[tuple[str, ObjectInfo | None]]:
        try:
            folder = self._call(self._fs.resolve_path, path).unresolve()
            items = self._call(self._fs.ls, path, refresh=True)
        except FileNotFoundError:
            return
        for item in items:
            if item["name"] != folder:  # the listing of a file is the file itself
                yield item["name"].rpartition("/")[2], None if item["type"] == "directory" else _info(item)

    def _call(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call an operation of the file system with retries; its exceptions become those of `storage.retry`."""

        def attempt() -> Any:
            try:
                result = super(HubBackend, self)._call(operation, *arguments, **options)
            except Exception as error:
                self._fs.invalidate_cache()  # it also keeps answers that a repository is missing
                raise self._translate(error) from error
            self._has_answered = True
            return result

        seconds = self._policy.timeout if self._has_answered else min(_FIRST_SECONDS, self._policy.timeout)
        return retry.RetryPolicy(seconds, self._policy.last_warning)(self.endpoint, attempt)

    def _translate(self, error: Exception) -> Exception:
        """Return what to raise for a failure of the file system, with the hub's address and the remedy."""
        wraps = isinstance(error, (FileNotFoundError, retry.StoreFailure)) and error.__cause__ is not None
        cause = error.__cause__ if wraps else error
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
        is_outage = status is not None and (status >= 500 or status in (408, 409, 429))
        self._has_answered |= status is not None and not is_outage
        at, denials = f"the hub at {self.endpoint}", {401: "did not accept the credentials", 403: "denied the access"}
        failure: retry.StoreFailure
        if isinstance(cause, errors.OfflineModeIsEnabled):
            failure = retry.PermanentError("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set", _OFFLINE_HINT)
        elif isinstance(cause, errors.GatedRepoError):
            hint = f"Accept its terms on its page at {self.endpoint}, and {_TOKEN_HINT}"
            failure = retry.PermanentError(f"{at} restricts the access to this repository ({status}, gated)", hint)
        elif isinstance(cause, (errors.RepositoryNotFoundError, errors.BucketNotFoundError)):
            reason = f"{at} has no such repository, or it is private ({status})"
            failure = retry.PermanentError(reason, _SPELLING_HINT)
        elif isinstance(cause, errors.RevisionNotFoundError):
            hint = "Name a branch, tag or commit of the repository after the @."
            failure = retry.PermanentError(f"{at} has this repository, but not this revision of it", hint)
        elif status in denials:
            failure = retry.PermanentError(
                f"{at} {denials[status]} ({status})", f"To read this repository, {_TOKEN_HINT}"
            )
        elif isinstance(cause, errors.EntryNotFoundError) or status == 404:
            return FileNotFoundError(errno.ENOENT, "no such file or folder in the repository")
        elif isinstance(cause, (json.JSONDecodeError, LookupError)):
            failure = retry.PermanentError(f"what answers at {self.endpoint} is not a hub", _ENDPOINT_HINT)
        elif isinstance(cause, ValueError) and status is None:
            reason = f"the hub has no such address ({' '.join(str(cause).split())[:200]})"
            hint = "Give hub folders as hf://owner/name, hf://owner/name@revision or hf://owner/name/folder."
            failure = retry.PermanentError(reason, hint)
        elif status is not None:
            kind = retry.TransientError if is_outage else retry.PermanentError
            failure = kind(f"{at} answered with status {status}", _ENDPOINT_HINT)
        elif isinstance(error, retry.TransientError) and wraps:
            failure = retry.TransientError(f"{at} cannot be reached ({str(error)[:200]})", _ENDPOINT_HINT)
        else:
            return error
        if isinstance(failure, retry.PermanentError) or not self._has_answered:
            failure.exit_status = 2
        return failure


def _info(item: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(item["size"], item.get("blob_id") or item.get("xet_hash"))
