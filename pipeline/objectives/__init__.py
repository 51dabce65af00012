"""Objectives: arithmetic on tensors, with no module, rank, logger or config inside."""
