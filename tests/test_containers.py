"""The images and the two services, as far as files tell without an engine; `make lint-containers` asks the linters."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
IMAGES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SERVICES = {"model-service": 5000, "client-service": 7860}
DEFAULT = re.compile(r"\$\{[A-Z_]+:-([^}]*)\}")


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    """A compose file, with every variable at its default."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(DEFAULT.sub(r"\1", text))
    return found


def instructions(path: Path) -> list[tuple[str, str]]:
    """(FROM, rest) of a Dockerfile, comments and continuations gone."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def last_stage(path: Path) -> list[tuple[str, str]]:
    """What the image itself is made of."""
    found = instructions(path)
    start = max(i for i, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_is_built_in_two_stages_from_one_pinned_base(path: Path) -> None:
    found = instructions(path)
    assert [rest for name, rest in found if name == "FROM"] == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]
    (base,) = [rest for name, rest in found if name == "ARG" and rest.startswith("PYTHON_IMAGE=")]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+\.\d+-slim-[a-z]+", base)
    steps = [step for name, rest in found if name == "RUN" for step in rest.split("&&") if "pip install" in step]
    assert len(steps) >= 2
    assert all("-c constraints.txt" in step or "--no-deps" in step for step in steps)
    last = [rest for name, rest in last_stage(path) if name == "RUN"]
    assert not any("pip install" in rest for rest in last)
    installed = [rest for rest in last if "apt-get install" in rest]
    assert len(installed) == (path.name == "model.Dockerfile")  # the compiler of the CPU kernels
    assert all("--no-install-recommends g++ libc6-dev" in rest for rest in installed)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_and_tells_its_health(path: Path) -> None:
    stage = last_stage(path)
    names = [name for name, _ in stage]
    user = [rest for name, rest in stage if name == "USER"][-1]
    assert int(user.split(":")[0]) > 999
    assert names.index("USER") < names.index("ENTRYPOINT")
    (health,) = [rest for name, rest in stage if name == "HEALTHCHECK"]
    (port,) = [rest for name, rest in stage if name == "EXPOSE"]
    assert f"127.0.0.1:{port}/" in health
    assert "healthcheck.py" in health
    assert "curl" not in health
    entry = [rest for name, rest in stage if name == "ENTRYPOINT"][-1]
    assert entry.startswith("[")  # no shell between the engine's signals and the process
    environment = " ".join(rest for name, rest in stage if name == "ENV")
    assert "HOME=/tmp" in environment


def test_every_file_that_is_copied_is_let_in() -> None:
    """.dockerignore lets in by name: what is new stays out, run folders and keys too."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    for path in IMAGES:
        for name, rest in instructions(path):
            if name == "COPY" and "--from" not in rest:
                for source in rest.split()[:-1]:
                    assert source == "." or source.split("/")[0] in let_in
    assert not {"runs", ".git", ".venv", "tests"} & let_in
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'readme = "README.md"' in project
    assert {"README.md", "LICENSE", "configs", "fathom"} <= let_in  # what building the package reads


def test_two_services_at_their_ports_on_this_machine_only() -> None:
    services = compose()["services"]
    assert set(services) == set(SERVICES)
    for name, port in SERVICES.items():
        assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
        assert services[name]["build"]["dockerfile"] in {f"docker/{path.name}" for path in IMAGES}
    assert services["client-service"]["depends_on"] == {"model-service": {"condition": "service_healthy"}}
    assert services["client-service"]["environment"]["FATHOM_API_URL"] == "http://model-service:5000"
    assert services["model-service"]["volumes"] == ["./runs/demo:/model:ro"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_little(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    places = {entry.split(":")[0]: entry for entry in service["tmpfs"]}
    assert list(places) == ["/tmp"] + ["/cache"] * (name == "model-service")
    assert [place for place, entry in places.items() if "exec" in entry] == list(places)[1:]
    assert all(volume.endswith(":ro") for volume in service.get("volumes", ()))
    assert service["pids_limit"]
    assert service["mem_limit"]
    assert service["restart"].startswith("on-failure:")  # a mistake is not told for ever
    assert service["healthcheck"]["test"][:3] == ["CMD", "python", "/opt/docker/healthcheck.py"]
    assert not {"privileged", "network_mode", "user", "pid"} & set(service)


def test_a_stop_waits_until_answers_had_their_time() -> None:
    from inspect import signature

    from fathom.cli.serve import command

    grace = signature(command).parameters["grace"].default
    assert int(compose()["services"]["model-service"]["stop_grace_period"].removesuffix("s")) > grace


def test_the_gpu_file_adds_a_gpu_and_torch_for_it() -> None:
    (added,) = compose("docker-compose.gpu.yml")["services"].items()
    name, service = added
    assert name == "model-service"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert service["build"]["args"] == {"TORCH_INDEX": ""}
    assert "--device cuda" in service["environment"]["FATHOM_SERVE_OPTIONS"]
    assert service["image"] != compose()["services"][name]["image"]


def test_what_the_services_set_is_read_by_somebody() -> None:
    readers = (*ROOT.glob("docker/*.py"), *ROOT.glob("fathom/cli/*.py"), ROOT / "fathom" / "places.py")
    read = "".join(path.read_text(encoding="utf-8") for path in readers)
    for service in compose()["services"].values():
        for name in service["environment"]:
            assert f'"{name}"' in read, name


# --- the scripts inside


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docker" / name), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def echo(tmp_path: Path) -> str:
    """A PATH on which `fathom` prints its arguments."""
    fake = tmp_path / "bin" / "fathom"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor each in "$@"; do echo "$each"; done\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return f"{fake.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("made", [False, True])
def test_without_a_model_it_says_how_to_get_one(tmp_path: Path, echo: str, made: bool) -> None:
    place = tmp_path / "model"
    if made:
        place.mkdir()
    done = script("model.py", PATH=echo, FATHOM_MODEL=str(place))
    assert done.returncode == 2
    assert done.stdout == ""
    for words in (str(place), "make demo", "docker-compose up model-service", "MODEL_PATH="):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_with_a_model_it_becomes_the_server(tmp_path: Path, echo: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    model = f"{tmp_path}@best"
    done = script("model.py", "--json", PATH=echo, FATHOM_MODEL=model)
    assert done.stdout.split() == ["serve", model, "--host", "0.0.0.0", "--port", "5000", "--json"]
    options = "--dtype bfloat16 --served-model-name 'a b'"
    done = script("model.py", PATH=echo, FATHOM_MODEL=model, FATHOM_MODEL_NAME="demo", FATHOM_SERVE_OPTIONS=options)
    tail = ["--served-model-name", "demo", "--dtype", "bfloat16", "--served-model-name", "a b"]
    assert done.stdout.splitlines()[-6:] == tail
    done = script("model.py", PATH=echo, FATHOM_MODEL=model, FATHOM_SERVE_OPTIONS="--name 'open")
    assert done.returncode != 0
    assert "FATHOM_SERVE_OPTIONS" in done.stderr


class Answer(BaseHTTPRequestHandler):
    """Ready, or not."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" else 503)
        self.end_headers()
        self.wfile.write(b"the weights are being read")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_health_is_an_exit_code(port: int) -> None:
    proxy = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    assert script("healthcheck.py", f"http://127.0.0.1:{port}/ready", **proxy).returncode == 0
    done = script("healthcheck.py", f"http://127.0.0.1:{port}/", **proxy)
    assert (done.returncode, "weights" in done.stdout) == (1, True)
    done = script("healthcheck.py", "http://127.0.0.1:1/ready")
    assert (done.returncode, "refused" in done.stdout) == (1, True)
    assert done.stderr == ""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11, which the images have")
def test_the_images_install_what_pyproject_asks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    serve = script("requirements.py", "--base", "--extra", "serve").stdout.splitlines()
    assert serve == project["dependencies"] + project["optional-dependencies"]["serve"]
    client = script("requirements.py", "--base", "typer", "rich", "pydantic", "--extra", "client").stdout.splitlines()
    assert client[3:] == project["optional-dependencies"]["client"]
    assert not any(line.startswith("torch") for line in client)
    assert re.fullmatch(r"torch==[\d.]+", script("requirements.py", "--pin", "torch").stdout.strip())
    assert script("requirements.py", "--base", "nothing").returncode == 1


def test_the_page_needs_no_torch() -> None:
    """What the client image leaves out must not be imported by the command that it runs."""
    left_out = ("torch", "numpy", "yaml", "tokenizers", "safetensors", "psutil", "matplotlib")
    code = (
        "import sys\n"
        f"for name in {left_out!r}: sys.modules[name] = None\n"
        "import fathom.cli.main, fathom.cli.client, fathom.client.http, fathom.client.routing\n"
    )
    pytest.importorskip("httpx_sse", reason="needs the extra `client`")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
