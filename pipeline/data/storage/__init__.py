"""Files by URL in local folders, S3-compatible stores and any store that fsspec supports.

Transient errors are retried with exponential backoff, full jitter and a timeout; an interrupted read resumes at the
byte where it broke off. Missing objects and denied access fail at once. Every failure is a StorageError that names the
URL and the remedy.
"""

from pipeline.data.storage.retry import NoSpace, NotFound, ObjectChanged
from pipeline.data.storage.storage import ObjectInfo, PartReader, Progress, Storage, in_parallel, join, split

__all__ = [
    "NoSpace", "NotFound", "ObjectChanged", "ObjectInfo", "PartReader", "Progress", "Storage",
    "in_parallel", "join", "split",
]  # fmt: skip
