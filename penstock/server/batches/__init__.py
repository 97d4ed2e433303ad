"""Files and batches of an engine's server: requests that nobody waits for, kept on disk."""
