"""Files by URL: local folders, S3-compatible stores and whatever else fsspec reaches, behind one small interface.

Transient faults are retried with exponential backoff, full jitter and a deadline, a read from the byte where it broke
off; what is missing or forbidden fails at once. Every failure is a StorageError that names the URL and says what to do.
"""

from pipeline.data.storage.backend import ObjectInfo, Part
from pipeline.data.storage.faults import NotFound, ObjectChanged
from pipeline.data.storage.storage import Storage
from pipeline.data.storage.urls import join, split

__all__ = ["NotFound", "ObjectChanged", "ObjectInfo", "Part", "Storage", "join", "split"]
