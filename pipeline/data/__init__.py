"""The data plane: from tars in object storage to the global batch of a step (contracts C1 and C7)."""
