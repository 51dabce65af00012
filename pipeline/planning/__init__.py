"""Estimates of a run before it starts: memory, compute, communication, storage, time and cost.

No training, cluster, data or accelerator is needed. `probe` measures the real training code on tensors without memory;
`estimate` combines that with DeepSpeed's ZeRO stages and a table of data sheets.
"""
