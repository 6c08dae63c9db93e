"""/openapi.json: FastAPI's own document, with the bodies that it is not told of, every error, and no 422."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fathom.serve.answers import ErrorBody
from fathom.serve.failures import STATUS_TEXT
from fathom.serve.protocol import Bounds

REF = "#/components/schemas/{model}"
RETRY = {"retry-after": {"schema": {"type": "string"}, "description": "Seconds."}}
HEADERS: dict[int, dict[str, Any]] = {
    401: {"www-authenticate": {"schema": {"type": "string"}}},
    405: {"allow": {"schema": {"type": "string"}}},
    429: RETRY,
    503: RETRY,
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of a route that are errors, for FastAPI's `responses`."""
    return {
        status: {"model": ErrorBody, "description": STATUS_TEXT[status], "headers": HEADERS.get(status, {})}
        for status in statuses
    }


def takes(*bodies: type[BaseModel]) -> dict[str, Any]:
    """The body of a route, for FastAPI's `openapi_extra`."""
    refs = [{"$ref": REF.format(model=body.__name__)} for body in bodies]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def events(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The answer of a route that streams: events whose data is JSON, but for the last, [DONE]."""
    refs = [{"$ref": REF.format(model=each.__name__)} for each in (chunk, ErrorBody)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": refs}}
    event = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}}}
    return {200: {"content": {"text/event-stream": {"schema": event}}}}


def document(app: FastAPI, more: Sequence[type[BaseModel]], bounds: Bounds, keys: bool) -> dict[str, Any]:
    """The whole document. more: bodies and chunks, which FastAPI does not know."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, unknown = models_json_schema([(model, "validation") for model in more], ref_template=REF)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(unknown["$defs"])
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for path in found["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            if keys and "401" in operation["responses"]:
                operation["security"] = [{"key": []}]
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    _bound(schemas, bounds)
    return found


def _bound(node: Any, bounds: Bounds) -> None:
    """Write this model's own bounds where `bodies.py` left a mark."""
    if isinstance(node, list):
        for each in node:
            _bound(each, bounds)
    elif isinstance(node, dict):
        if node.pop("x-token", None):
            node["maximum"] = bounds.vocabulary - 1
        if node.pop("x-output", None) and bounds.output is not None:
            node["maximum"] = bounds.output
        if node.pop("x-least", None):
            node["maximum"] = bounds.ceiling
        if node.pop("x-prompt", None):
            node["maxItems"] = min(bounds.window - 1, bounds.prompt or bounds.window)
        if node.pop("x-token-keys", None):
            node["maxProperties"] = 1024
            node["patternProperties"] = {up_to(bounds.vocabulary - 1): node["additionalProperties"]}
            node["additionalProperties"] = False
        for each in node.values():
            _bound(each, bounds)


def up_to(largest: int) -> str:
    """A pattern of the whole numbers from 0 to `largest`, written without leading zeros."""
    digits = str(largest)
    parts = ["0"] if largest else []
    if len(digits) > 1:
        parts.append(f"[1-9][0-9]{{0,{len(digits) - 2}}}")
    for i, digit in enumerate(digits):
        least = 1 if i == 0 else 0
        if int(digit) > least:
            rest = len(digits) - i - 1
            parts.append(f"{digits[:i]}[{least}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"^({'|'.join([*parts, digits])})$"
