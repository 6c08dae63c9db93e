"""`python api.py RUN [--port 5000]`: the REST API for inference. The same as `fathom serve RUN ...`."""

import sys

from fathom.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
