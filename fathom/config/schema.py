"""The JSON schema of a configuration class, for editors that complete YAML."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def json_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """JSON schema (2020-12) of the files that `read` and `parse` accept.

    Nothing but a `kind` without default is required: a file may leave to its `base:` what it does not say itself, and
    what is missing in the end is told by `parse`.
    """
    schema = cls.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        required = [key for key in part.pop("required", []) if "const" in part["properties"][key]]
        if required:
            part["required"] = required
    base = {
        "type": "string",
        "title": "Base",
        "description": "Another YAML file, relative to this one, that this one is laid over.",
    }
    schema["properties"] = {"base": base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
