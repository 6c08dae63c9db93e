"""From raw text to batches: sources -> shards -> mixture -> packing -> `Batch`."""
