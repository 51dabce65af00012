"""Published checkpoint formats, one converter each."""
