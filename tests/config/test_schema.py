"""The JSON schema accepts what parse accepts, and refuses what it refuses, as far as a schema can."""

from __future__ import annotations

import pytest

from fathom.config.schema import json_schema
from tests.config.toys import Toy

jsonschema = pytest.importorskip("jsonschema")
GOOD = {"data": {"datasets": [{"kind": "hub", "path": "x"}]}}


def accepts(value: dict[str, object]) -> bool:
    schema = json_schema(Toy)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"base": "other.yaml"},
        {"model": {"attention": {"kind": "mla", "kv_lora_rank": 3}}},
        {"model": {"attention": {"num_attention_heads": 4}}},
        {"model": {"moe": None}, "training": {"output_dir": "runs/x", "betas": [0.9, 0.95], "threads": "auto"}},
    ],
)
def test_accepts(more: dict[str, object]) -> None:
    assert accepts({**GOOD, **more})
    assert accepts(more), "what a base says need not be said again"


@pytest.mark.parametrize(
    "more",
    [
        {"modle": {}},
        {"model": {"hiden_size": 3}},
        {"model": {"hidden_size": "3"}},
        {"model": {"attention": {"kind": "nla"}}},
        {"model": {"attention": {"kind": "gqa", "kv_lora_rank": 3}}},
        {"data": {"datasets": [{"path": "x"}]}},
        {"base": 3},
    ],
)
def test_refuses(more: dict[str, object]) -> None:
    assert not accepts({**GOOD, **more})


def test_the_description_under_a_field_is_in_the_schema() -> None:
    assert json_schema(Toy)["$defs"]["Mla"]["properties"]["kv_lora_rank"]["description"] == "C: width of the latent."
