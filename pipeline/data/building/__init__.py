"""Making shards: from the annotation files and folders that people have, and from nothing (drawn scenes)."""
