"""Checkpoints that are visible only once complete (contract C5), in one format for every world size and ZeRO stage.

    <run>/checkpoints/step-00000150.0003-9f86d081-19ad3c7f2e1/
        rank-00000.safetensors   named float32 fragments of one rank
        rank-00001.json          another rank's file record, for rank 0
        MANIFEST.json            size and SHA-256 of each file; step, digests, config
        SEAL.json                which attempt decides about the folder: its writer, or a later start that removes it
        COMMIT.json              written last; without it the folder does not count as a checkpoint

The name holds the start that wrote it (see `ownership`) and the time, so that a retry never shares a folder with an
earlier attempt, and no attempt deletes what a later one writes.
"""
