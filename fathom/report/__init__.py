"""What a run left on disk, as one HTML page. Reads run folders and knows nothing else; no torch."""
