"""Checkpoints in other people's formats, both ways. Is handed a model, a configuration, a tokenizer and paths."""
