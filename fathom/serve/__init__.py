"""Serving: an engine that batches continuously, and the HTTP API in front of it. Is handed a model, never a path."""
