"""The architecture. Knows only the ground: no optimizer, process group, file format or trainer."""
