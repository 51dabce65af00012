"""What a run will need, before it is run: memory, arithmetic, communication, storage, time and cost.

Nothing here trains, and nothing needs a cluster, data or an accelerator. `probe` watches real code run on tensors
without memory; `memory` knows what DeepSpeed keeps at each ZeRO stage; `hardware` is a table of data sheets; `estimate`
puts them together, `scaling` over many GPUs.
"""
