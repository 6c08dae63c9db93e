"""`python train.py [section.key=value ...]`: train the model of config.yaml, the description that Fathom grew from.

The same as `fathom train config.yaml ...`; a first argument that ends in .yaml names another configuration.
"""

import sys
from pathlib import Path

from fathom.cli.main import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not (arguments and arguments[0].endswith((".yaml", ".yml"))):
        arguments.insert(0, str(Path(__file__).with_name("config.yaml")))
    sys.exit(main(["train", *arguments]))
