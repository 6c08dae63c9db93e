"""Set Fathom up in a virtual environment of its own: `python3 bootstrap.py`, then `.venv/bin/fathom --help`.

Works on Linux, macOS and Windows with nothing but Python 3.10 or newer and a package registry. Running it again does
nothing until pyproject.toml, constraints.txt or the options change. On Linux the registry's own torch carries several
GB of CUDA libraries; on a machine without an NVIDIA GPU the CPU build is looked for first (a wheel on this machine,
then PyTorch's public CPU index), and a notice is printed when neither has it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """What stands in the way, and what to do about it."""


def venv_python(venv: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path) -> None:
    """Create the environment unless a working one stands there."""
    python = venv_python(venv)
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    if venv.exists() and not (venv / "pyvenv.cfg").exists() and any(venv.iterdir()):
        raise SetupError(f"{venv} exists and is no virtual environment. Move it away, or give --venv another path.")
    print(f"Creating a virtual environment in {venv}", flush=True)
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(
            f"Python could not make a virtual environment:\n{(done.stdout + done.stderr).strip()}\n"
            "On Debian and Ubuntu the module comes with `apt install python3-venv`."
        )


def pip(venv: Path, *arguments: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run pip inside the environment; quiet captures what it says."""
    command = [str(venv_python(venv)), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, text=True, capture_output=quiet)


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def brings_cuda(report: Path) -> bool:
    """Whether an installation plan (pip's --report file) holds CUDA packages, or a torch built for CUDA."""
    for item in json.loads(report.read_text(encoding="utf-8")).get("install", []):
        name, version = item["metadata"]["name"].lower(), item["metadata"]["version"]
        if name.startswith(("nvidia-", "cuda-")) or name == "triton" or (name == "torch" and "+cu" in version):
            return True
    return False


def pinned(name: str) -> str:
    """The requirement that constraints.txt pins for a package: `torch==2.13.0`."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.split("#")[0].strip()
        if requirement.lower().startswith(f"{name}=="):
            return requirement
    return name


def install_cpu_torch(venv: Path) -> None:
    """Install a CPU build of torch if this machine or PyTorch's CPU index has one; else say what will come."""
    if pip(venv, "show", "torch", quiet=True).returncode == 0:
        return
    torch = pinned("torch")
    places = {"a wheel on this machine": ["--no-index"], "PyTorch's CPU index": ["--index-url", CPU_INDEX]}
    for place, where in places.items():
        with tempfile.TemporaryDirectory() as folder:
            plan = Path(folder) / "plan.json"
            # The plan is made for torch alone (--no-deps): what torch needs comes later from the usual registry.
            options = ["install", "--retries", "0", "--timeout", "15", "--no-deps", *where, torch]
            tried = pip(venv, *options, "--dry-run", "--quiet", "--report", str(plan), quiet=True)
            if tried.returncode != 0 or not plan.exists() or brings_cuda(plan) or not is_cpu_build(plan, where):
                continue
            print(f"Installing {torch} (CPU build) from {place}", flush=True)
            if pip(venv, *options, "--quiet").returncode == 0:
                return
    print(
        f"Notice: no CPU build of {torch} was found on this machine or at {CPU_INDEX}, so the registry's own build is\n"
        "installed; on Linux that brings several GB of CUDA libraries. To avoid them, put a CPU wheel where pip's\n"
        "`find-links` looks and run this again.",
        flush=True,
    )


def is_cpu_build(report: Path, where: list[str]) -> bool:
    """A CPU build says `+cpu`; PyTorch's CPU index holds nothing else, whatever the version says."""
    items = json.loads(report.read_text(encoding="utf-8")).get("install", [])
    return "--index-url" in where or any(item["metadata"]["version"].endswith("+cpu") for item in items)


def install(venv: Path, extras: str) -> None:
    """Install Fathom itself, editable, with what was tested (constraints.txt)."""
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    print("Installing Fathom and what it needs" + (f" (extras: {extras})" if extras else ""), flush=True)
    done = pip(venv, "install", "--quiet", "-c", str(ROOT / "constraints.txt"), "-e", target)
    if done.returncode != 0:
        raise SetupError(
            "pip could not install Fathom; its words are above. Without a network, a package registry that pip can\n"
            "reach is needed once (pip's `index-url` or `find-links`)."
        )


def stamp(extras: str, kind: str) -> str:
    """A fingerprint of everything that decides what is installed."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "bootstrap.py"):
        digest.update((ROOT / name).read_bytes())
    digest.update(f"{extras}|{kind}|{sys.version_info[:2]}|{ROOT}".encode())
    return digest.hexdigest()


def bootstrap(venv: Path, extras: str, kind: str) -> None:
    """The whole set-up; does nothing when it was done before with the same files and options."""
    if sys.version_info < (3, 10):  # noqa: UP036 - whatever python3 there is runs this file
        raise SetupError(f"Fathom needs Python 3.10 or newer; this is {platform.python_version()}. Try python3.12.")
    mark = venv / "fathom-setup.json"
    wanted = stamp(extras, kind)
    done = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
    if wanted in done.get("stamps", []) and venv_python(venv).exists():
        return
    make_venv(venv)
    if kind == "cpu" or (kind == "auto" and platform.system() == "Linux" and not has_nvidia_gpu()):
        install_cpu_torch(venv)
    install(venv, extras)
    # What `dev` installs contains what the plain set-up needs, so `make demo` after `make test` installs nothing.
    mark.write_text(json.dumps({"stamps": sorted({wanted, stamp("", kind)})}), encoding="utf-8")


def main() -> int:
    """Read the options, set up, say where the command is."""
    parser = argparse.ArgumentParser(description="Set Fathom up in a virtual environment of its own.")
    parser.add_argument("--extras", default="", help="extras of pyproject.toml, comma-separated: dev, hub, ...")
    parser.add_argument("--torch", default="auto", choices=["auto", "cpu", "registry"], help="which build of torch")
    parser.add_argument("--venv", type=Path, default=VENV, help="where the environment lives (default: .venv)")
    options = parser.parse_args()
    try:
        bootstrap(options.venv.absolute(), options.extras, options.torch)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; run it again to go on.", file=sys.stderr)
        return 130
    command = venv_python(options.venv).parent / ("fathom.exe" if os.name == "nt" else "fathom")
    print(f"Ready: {command} --help", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
