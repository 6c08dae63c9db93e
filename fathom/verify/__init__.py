"""Proof that a checkpoint is what it claims to be: by our own code, and by other people's engines."""
