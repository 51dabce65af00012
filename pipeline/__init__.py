"""Staged vision-language pretraining: configuration, data, models, objectives, training, tracking, evaluation.

Nothing here imports Ray: `jobs` places this package on a cluster, `torchrun` runs it without one.
"""
