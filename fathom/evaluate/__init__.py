"""How good a model is: losses on held-out text, and samples to read. Handed a model, never a path."""
