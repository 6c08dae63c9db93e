"""The training loop: state, checkpoints, guards, tables."""
