"""Reading of samples from shards: local files, a store, or the node cache, with prefetching."""
