"""From a sample's place to its bytes: shards in a store, kept on the node or in memory, fetched ahead of need."""
