"""Text in, batches out. Knows nothing of ranks beyond two integers."""
