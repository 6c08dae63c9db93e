"""Text from a model: requests, sampling, caches, the reference loop, and MTP's speculative one."""
