"""Knobs: the frozen, strict base of every configuration class.

A knob stands beside what it turns: `MLAConfig` is above `class MLA`. `config/` reads YAML into these classes and turns
pydantic's complaints into messages with file and line; nothing here knows about files.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

T = TypeVar("T")

# YAML and JSON have lists and no tuples; a frozen class wants tuples. Only the container is lax, its items stay strict.
Many = Annotated[tuple[T, ...], Field(strict=False)]


class Knobs(BaseModel):
    """A frozen pydantic model: unknown keys are refused, types are strict (an int may stand for a float), and the
    docstring under a field is its description in the JSON schema."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
