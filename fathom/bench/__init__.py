"""Our speed beside the peers', in one run: every figure is a ratio between contestants that took turns on this machine,
or a share of what the machine can do, measured in the same minute."""
