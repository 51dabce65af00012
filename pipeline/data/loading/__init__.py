"""The loader: batches of a rank in order, prepared by threads, processes or actors."""
