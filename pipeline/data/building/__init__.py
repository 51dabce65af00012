"""Building of shards: importers of image-text files and annotations, and synthetic scenes."""
