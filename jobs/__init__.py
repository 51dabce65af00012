"""The `mome` command line and its Ray jobs; the only layer that may import Ray."""
