"""schemathesis on /openapi.json, all checks: no 5xx, no undocumented answer, no schema broken, open and with keys."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from common import KEY, KEYED, OPEN, Checks

check = Checks()
examples = os.environ.get("FATHOM_FUZZ", "60")
seen = 0
for name, url, more in (("open", OPEN, []), ("keyed", KEYED, ["-H", f"Authorization: Bearer {KEY}"])):
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--checks", "all",
        "--max-examples", examples, "--request-timeout", "120", "--seed", "1", "--no-color", *more,
    ]  # fmt: skip
    if name == "keyed":  # what needs no engine, and the checks of keys
        command += ["--include-path-regex", "models|tokenize|metrics"]
    done = subprocess.run(command, capture_output=True, text=True)
    cases = re.search(r"Test cases:\n\s*(\d+) generated", done.stdout)
    seen += int(cases[1]) if cases else 0
    if done.returncode:
        print(done.stdout[-8000:], done.stderr[-2000:])
    check(f"{name}: no failure", done.returncode == 0 and cases, cases and f"{cases[1]} cases")
check.end(f"schemathesis {version('schemathesis')}: {seen} cases")
