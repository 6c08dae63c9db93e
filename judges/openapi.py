"""openapi-spec-validator on /openapi.json, and that every answer has a schema."""

from __future__ import annotations

import json
import urllib.request
from importlib.metadata import version

from common import OPEN, Checks
from openapi_spec_validator import validate

check = Checks()
with urllib.request.urlopen(f"{OPEN}/openapi.json") as answer:
    document = json.load(answer)
validate(document)
check("the document is valid", True, document["openapi"])
operations = [(path, method, o) for path, item in document["paths"].items() for method, o in item.items()]
for path, method, operation in operations:
    untyped = [s for s, r in operation["responses"].items() if not all(c["schema"] for c in r["content"].values())]
    bodied = method != "post" or operation["requestBody"]["content"]["application/json"]["schema"]
    check(f"{method.upper()} {path}", not untyped and bodied, f"{len(operation['responses'])} answers")
closed = [n for n, s in document["components"]["schemas"].items() if s.get("additionalProperties", True) is not False]
check("every object is closed", not closed, closed or f"{len(document['components']['schemas'])} schemas")
check.end(f"openapi-spec-validator {version('openapi-spec-validator')}: {len(operations)} operations")
