"""Validates custom resources as an API server would, and stricter: an unknown field is an error, not dropped.

A CustomResourceDefinition's OpenAPI schema is turned into JSON Schema; its defaults are filled in first, as the server
does, and then ``x-kubernetes-validations`` (CEL) are evaluated. Rules on ``oldSelf`` are about updates and left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import yaml
from jsonschema import Draft202012Validator

_KEEP = "x-kubernetes-preserve-unknown-fields"
_CEL = "x-kubernetes-validations"
_INT_RANGES = {"int32": 2**31, "int64": 2**63}


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as strict JSON Schema: an object has just the fields that are listed."""
    schema = dict(schema)
    if schema.get("nullable") and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    if (limit := _INT_RANGES.get(schema.get("format", ""))) is not None and schema.get("type") == "integer":
        schema |= {"minimum": max(schema.get("minimum", -limit), -limit)}
        schema |= {"maximum": min(schema.get("maximum", limit - 1), limit - 1)}
    if isinstance(schema.get("items"), dict):
        schema["items"] = strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict(schema["additionalProperties"])
    if "properties" in schema:
        schema["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
    if schema.get("type") == "object" and not schema.get(_KEEP):
        schema.setdefault("additionalProperties", False)
    return schema


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A copy with the schema's defaults where a field is missing from an object that is there."""
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties", {})
    rest = schema.get("additionalProperties")
    parts = {name: properties.get(name, rest if isinstance(rest, dict) else {}) for name in value}
    missing = {name: part for name, part in properties.items() if name not in value and "default" in part}
    filled = value | {name: copy.deepcopy(part["default"]) for name, part in missing.items()}
    return {name: with_defaults(item, parts.get(name, properties.get(name, {}))) for name, item in filled.items()}


@cache
def _compiled(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _holds(rule: str, value: Any) -> bool:
    return bool(_compiled(rule).evaluate({"self": celpy.json_to_cel(value)}))


def broken_rules(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Messages of the CEL rules that the value breaks, at every depth."""
    for rule in schema.get(_CEL, ()):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], value):
            yield f"{where}: {rule.get('message', rule['rule'])}"
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from broken_rules(item, schema.get("items", {}), f"{where}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from broken_rules(item, schema.get("properties", {}).get(name, {}), f"{where}.{name}")


class CustomResource:
    """One version of one custom resource."""

    def __init__(self, path: Path, version: str = "v1") -> None:
        definition = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        versions = {v["name"]: v for v in definition["spec"]["versions"]}
        self.api_version = f"{definition['spec']['group']}/{version}"
        self.kind = definition["spec"]["names"]["kind"]
        self._schema = versions[version]["schema"]["openAPIV3Schema"]
        # The server itself knows what a top-level metadata holds; a CRD only says that it is an object.
        properties = self._schema["properties"] | {"metadata": {"type": "object", _KEEP: True}}
        self._validator = Draft202012Validator(strict(self._schema | {"properties": properties}))

    def problems(self, value: dict[str, Any]) -> list[str]:
        """What an API server, or a careful reader, would object to; empty if nothing."""
        if (value.get("apiVersion"), value.get("kind")) != (self.api_version, self.kind):
            return [f"expected {self.api_version} {self.kind}"]
        filled = with_defaults(value, self._schema)
        wrong = [f"{error.json_path}: {error.message}" for error in self._validator.iter_errors(filled)]
        return wrong or list(broken_rules(filled, self._schema))
