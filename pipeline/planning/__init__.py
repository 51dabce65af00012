"""Estimates of a run before it starts: memory, compute, communication, storage, time and cost.

No training, cluster, data or accelerator is needed. `probe` measures the real training code on tensors without memory;
`memory` models DeepSpeed's ZeRO stages; `hardware` is a table of data sheets; `estimate` combines them.
"""
