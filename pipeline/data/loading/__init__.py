"""Who prepares a rank's batches, by threads or processes, and the hash that proves what they hold."""
