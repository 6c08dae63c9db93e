"""`make golden`: write the golden losses anew."""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from golden_run import COLUMNS, FILE, rows

with tempfile.TemporaryDirectory() as place:
    found = rows(Path(place) / "run")
with FILE.open("w", newline="") as file:
    table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(found)
print(f"{FILE}: {len(found)} rows, the last {found[-1]}")
