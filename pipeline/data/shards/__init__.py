"""What a source has: tars and their indexes, the manifest that names them, and which of their samples are read."""
