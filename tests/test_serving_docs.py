"""docs/serving.md tells of everything that there is, and of nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SERVE = ROOT / "fathom" / "serve"


def options(name: str) -> set[str]:
    """Every option of a command, as it is typed; of a switch that is on, the one that turns it off."""
    from fathom.cli.main import open_command

    found = set()
    for parameter in open_command(name).params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            found.add(parameter.secondary_opts[0] if parameter.secondary_opts else parameter.opts[0])
    return found


@pytest.mark.parametrize("command", ["serve", "client"])
def test_every_option_is_there(command: str) -> None:
    assert {option for option in options(command) if f"`{option}" not in DOC} == set()


def test_no_option_is_told_that_is_not_there() -> None:
    told = set(re.findall(r"`(--[a-z-]+)", DOC))
    known = options("serve") | options("client")
    assert told - known == {"--tensor-parallel-size"}  # vLLM's


def test_every_metric_is_there() -> None:
    names = set(re.findall(r'"((?:vllm|fathom):[a-z_]+)"', (SERVE / "metrics.py").read_text(encoding="utf-8")))
    assert len(names) > 25
    told = set(re.findall(r"`((?:vllm|fathom):[a-z_]+?)(?:_total)?`", DOC))
    assert told == names


def test_every_path_is_there() -> None:
    paths = set(re.findall(r'(?:get|post)\(\s*"(/[^"{]*)', (SERVE / "api.py").read_text(encoding="utf-8")))
    assert {"/v1/completions", "/health", "/generate"} <= paths
    assert {path for path in paths if path.rstrip("/") not in DOC} == set()


def test_every_fact_of_a_model_is_there() -> None:
    from fathom.serve.answers import ModelDetails

    assert {name for name in ModelDetails.model_fields if name not in DOC} == set()


def test_every_variable_of_the_containers_is_there() -> None:
    for name in ("docker-compose.yml", "docker-compose.gpu.yml"):
        for variable in re.findall(r"\$\{([A-Z_]+)", (ROOT / name).read_text(encoding="utf-8")):
            assert f"`{variable}`" in DOC
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    assert all(f"docker-compose up {service}" in DOC for service in services)


def test_its_pictures_and_links_are_there() -> None:
    heads = {re.sub(r"[^a-z -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)", DOC, re.M)}
    for link in re.findall(r"\]\(([^)]+)\)", DOC):
        if link.startswith("#"):
            assert link[1:] in heads
        elif not link.startswith("https://"):
            assert (ROOT / "docs" / link).is_file()
