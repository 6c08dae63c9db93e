"""Attention: what a cache must offer, the kernel, and the members of the union in `variants`."""
