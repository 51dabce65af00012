"""Tracking: a local journal first, MLflow in the background (contract C6)."""
