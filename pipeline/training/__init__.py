"""Training: stages, the global-batch step, the engine, checkpoints and the loop (contracts C2 to C5)."""
