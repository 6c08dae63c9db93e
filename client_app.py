"""`python client_app.py [--api URL] [--port 7860]`: the page in the browser. The same as `fathom client ...`."""

import sys

from fathom.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["client", *sys.argv[1:]]))
