"""The strict base of every JSON body, and complaints about one in words.

Unknown fields are refused with the nearest known name; null means that the field was left out; a field that could
change the answer and is not honoured exists as a `Neutral`, which takes its harmless values only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import orjson
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from fathom.serve.failures import ApiError, bad

TAG = "="  # tags of unions begin with it; they are no part of a field's name
TOLD = 4  # so many complaints are told at once


class Wire(BaseModel):
    """A JSON object. The docstring under a field is its description in /openapi.json."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,
    )


W = TypeVar("W", bound=Wire)


def whole(value: Any) -> Any:
    """JSON knows one kind of number: 16.0 is 16."""
    return int(value) if type(value) is float and value.is_integer() else value


def wholes(values: Any) -> Any:
    """The same in a list."""
    return [whole(value) for value in values] if isinstance(values, list) else values


@dataclass(frozen=True)
class Neutral:
    """A field that is known and not honoured: null and `values` pass, which change nothing; anything else is refused,
    and `why` is told."""

    why: str
    values: tuple[Any, ...] = ()

    def check(self, value: Any) -> Any:
        """The value, if it is harmless."""
        if value is None or any(type(value) is type(each) and value == each for each in self.values):
            return value
        possible = ", ".join(["null", *(orjson.dumps(each).decode() for each in self.values)])
        raise PydanticCustomError("not_honoured", "{words}", {"words": f"possible: {possible}. {self.why}"})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [None, *self.values], "description": f"Not honoured: {self.why}"}


def read(model: type[W], raw: bytes) -> W:
    """JSON bytes -> a checked object. ApiError 400: no JSON, an unknown or impossible field."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise complaint(model, error) from None


CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "not_honoured": "unsupported_parameter",
    "json_invalid": "invalid_json",
}


def complaint(model: type[Wire], error: ValidationError) -> ApiError:
    """Pydantic's complaints as one error, the first of which gives param and code."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    words = [_words(model, each) for each in found[:TOLD]]
    if len(found) > TOLD:
        words.append(f"and {len(found) - TOLD} more")
    kind = first["type"]
    code = CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    return bad("; ".join(words), name_of(first["loc"]) or None, code)


def name_of(loc: tuple[int | str, ...]) -> str:
    """`messages.0.content`."""
    return ".".join(str(part) for part in loc if not str(part).startswith(TAG))


def _words(model: type[Wire], error: ErrorDetails) -> str:
    name, kind = name_of(error["loc"]), error["type"]
    if kind == "json_invalid":
        return f"The body is not JSON: {error['msg'].removeprefix('Invalid JSON: ')}"
    if kind == "extra_forbidden":
        known = list(_fields_at(model, error["loc"][:-1]))
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"possible are {', '.join(known)}"
        return f"There is no field {name}; {hint}"
    if kind == "missing":
        return f"{name} is missing"
    given = error["input"]
    shown = isinstance(given, int | float | bool) or (isinstance(given, str) and len(given) <= 40)
    said = error["msg"][:1].lower() + error["msg"][1:]
    if not name:
        return f"The body is wrong: {said}"
    return f"{name} is {given!r}: {said}" if shown else f"{name}: {said}"


def _fields_at(model: type[Wire], loc: tuple[int | str, ...]) -> Iterator[str]:
    """The known names of the object at a place of a body."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            inner = next(_models_in(model.model_fields[part].annotation), None)
            model = model if inner is None else inner
    yield from model.model_fields


def _models_in(annotation: Any) -> Iterator[type[Wire]]:
    if isinstance(annotation, type) and issubclass(annotation, Wire):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
