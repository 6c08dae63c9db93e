"""guidellm: synthetic load, sixteen streams at once, then at a constant rate."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import MODEL, OPEN, RUN, Checks

check = Checks()


def bench(name: str, profile: str, requests: int) -> dict[str, Any]:
    """One benchmark's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            str(Path(sys.executable).with_name("guidellm")), "run",
            "--backend", f"kind=openai_http,target={OPEN},model={MODEL}",
            "--profile", profile,
            "--constraint", f"kind=max_requests,count={requests}",
            "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16",
            "--tokenizer", f"kind=huggingface_auto,model={Path(RUN, 'tokenizer')}",
            "--output", f"kind=json,path={report}",
            "--disable-console",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode or not report.exists():
            print(done.stdout[-3000:], done.stderr[-3000:])
            check(f"guidellm {name}", False, f"exit code {done.returncode}")
            check.end(f"guidellm {version('guidellm')}")
        found: dict[str, Any] = json.loads(report.read_text())["benchmarks"][0]["metrics"]
        return found


for name, profile, requests in (
    ("concurrent", "kind=concurrent,streams=16", 96),
    ("constant", "kind=constant,rate=4", 24),
):
    metrics = bench(name, profile, requests)
    totals = metrics["request_totals"]
    speed = metrics["output_tokens_per_second"]["successful"]["mean"]
    first = metrics["time_to_first_token_ms"]["successful"]["median"]
    lengths = metrics["output_token_count"]["successful"]
    check(f"{name}: all {requests} answered", totals["successful"] == requests and not totals["errored"], totals)
    check(f"{name}: ignore_eos held", lengths["mean"] == 16, f"{lengths['mean']} tokens each")
    check(f"{name}: timed", speed > 0 and first > 0, f"{speed:.0f} tokens/s, first token after {first:.0f} ms (median)")
check.end(f"guidellm {version('guidellm')}: {speed:.0f} tokens/s at 4 requests a second")
