"""Shards of a source: tars and their indexes, the manifest, and the selection of samples."""
