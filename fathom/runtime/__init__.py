"""The machine: device and arithmetic, ranks, random numbers."""
