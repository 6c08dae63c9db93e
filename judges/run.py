"""`make judges`: a small trained run is served, and programs of other people say what they see.

Needs the package registries once (PyPI, npm); everything is made under build/judges. No part of the tests or of CI.
`python judges/run.py NAME ...` runs only those.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import bootstrap  # noqa: E402 - of the repository's root

WORK = ROOT / "build" / "judges"
VENV, NODE, RUN = WORK / "venv", WORK / "node", WORK / "run"
MODEL, KEY = "judged", "a-key-of-the-judges"
JUDGES = {
    "openai": "openai_python.py",
    "openai-node": "openai_node.mjs",
    "langchain": "langchain.py",
    "lm-eval": "lm_eval_local.py",
    "guidellm": "load_guidellm.py",
    "schemathesis": "fuzz.py",
    "prometheus": "prometheus.py",
    "openapi": "openapi.py",
}
TRAIN = [
    "configs/tiny.yaml", f"training.output_dir={RUN}", "training.max_steps=400", "model.max_position_embeddings=2048",
    "tokenizer={kind: bpe, vocab_size: 1024}",
]  # fmt: skip


def inside(venv: Path, name: str) -> Path:
    """A program of a virtual environment."""
    return venv / ("Scripts" if os.name == "nt" else "bin") / (f"{name}.exe" if os.name == "nt" else name)


def prepare(names: list[str]) -> None:
    """The judges' own environments, and the run that is served."""
    WORK.mkdir(parents=True, exist_ok=True)
    requirements = HERE / "requirements.txt"
    stamp, wanted = VENV / "stamp", hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == wanted):
        print(f"Installing the judges in {VENV}", flush=True)
        bootstrap.make_venv(VENV)
        if sys.platform == "linux" and not bootstrap.has_nvidia_gpu():
            bootstrap.install_cpu_torch(VENV)  # guidellm wants torch; the registry's own carries several GB of CUDA
        pip = [str(inside(VENV, "python")), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        stamp.write_text(wanted)
    if "openai-node" in names:
        NODE.mkdir(exist_ok=True)
        for file in ("package.json", "openai_node.mjs"):
            shutil.copy(HERE / file, NODE / file)
        npm = shutil.which("npm")
        if npm is None:
            sys.exit("error: npm is not here; install Node.js, or name the other judges: " + " ".join(JUDGES))
        subprocess.run([npm, "install", "--no-fund", "--no-audit", "--silent"], cwd=NODE, check=True)
    if not (RUN / "run.json").exists():
        print("Training the run that is served", flush=True)
        subprocess.run([*fathom(), "train", *TRAIN], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)


def fathom() -> list[str]:
    """The command, in the environment that this runs in."""
    return [sys.executable, "-m", "fathom"]


@contextlib.contextmanager
def served(log: Path, *options: str) -> Iterator[str]:
    """A server's address."""
    command = [*fathom(), "serve", str(RUN), "--port", "0", "--served-model-name", MODEL, *options]
    with log.open("w") as out, subprocess.Popen(
        command, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stderr is not None
        told, url = "", None
        for line in process.stderr:
            told += line
            url = re.search(r"listens at (\S+)", line)
            if url:
                break
        if url is None:
            sys.exit(f"error: the server did not start:\n{told}")
        try:
            yield url[1]
        finally:
            process.terminate()
            rest = process.stderr.read()
            code = process.wait(timeout=60)
            print(f"The server left with code {code}" + (f":\n{rest}" if "Traceback" in rest else ""), flush=True)


def judge(name: str, environment: dict[str, str]) -> tuple[bool, str, float]:
    """Run one; whether it is content, what it saw, seconds."""
    script = JUDGES[name]
    print(f"\n== {name}", flush=True)
    node = script.endswith(".mjs")
    command = ["node", str(NODE / script)] if node else [str(inside(VENV, "python")), str(HERE / script)]
    began, seen = time.monotonic(), "it said nothing"
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("SEEN "):
                seen = line.removeprefix("SEEN ").strip()
    return process.returncode == 0, seen, time.monotonic() - began


def main() -> int:
    """Everything, and a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(JUDGES)} (default: all)")
    names = parser.parse_args().names or list(JUDGES)
    unknown = [name for name in names if name not in JUDGES]
    if unknown:
        parser.error(f"there is no judge {unknown[0]}; possible are {', '.join(JUDGES)}")
    prepare(names)
    rows = []
    with served(WORK / "open.log", "--max-output-tokens", "128") as url, served(
        WORK / "keyed.log", "--api-key", KEY, "--rate-limit", "600"
    ) as keyed:  # fmt: skip
        environment = {
            "FATHOM_URL": url, "FATHOM_KEYED_URL": keyed, "FATHOM_KEY": KEY, "FATHOM_MODEL": MODEL,
            "FATHOM_RUN": str(RUN), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": str(WORK / "datasets"), "OPENAI_API_KEY": "none", "TQDM_DISABLE": "1",
        }  # fmt: skip
        for name in names:
            rows.append((name, *judge(name, environment)))
    print("\njudge         verdict  seconds  seen")
    for name, content, seen, seconds in rows:
        print(f"{name:<13} {'content' if content else 'FAILED':<8} {seconds:>7.0f}  {seen}")
    return 0 if all(row[1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
