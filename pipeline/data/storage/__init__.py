"""Files by URL: local folders, S3-compatible stores and whatever else fsspec reaches, behind one small interface.

Transient faults are retried with exponential backoff, full jitter and a deadline, a read from the byte where it broke
off; what is missing or forbidden fails at once. Every failure is a StorageError that names the URL and says what to do.
"""

from pipeline.data.storage.backends import ObjectInfo, PartReader
from pipeline.data.storage.errors import NotFound, ObjectChanged
from pipeline.data.storage.storage import Storage, join, split

__all__ = ["NotFound", "ObjectChanged", "ObjectInfo", "PartReader", "Storage", "join", "split"]
