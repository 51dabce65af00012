"""Runs a function on several gloo ranks of this machine, each a process of its own, for tests."""

from pipeline.training.local_ranks import run_ranks

__all__ = ["run_ranks"]
