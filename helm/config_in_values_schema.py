"""Keeps ``launch/config_schema.json`` inside the chart's ``values.schema.json``, so that Helm itself refuses a bad
configuration: ``make schema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VALUES = ROOT / "helm" / "baton" / "values.schema.json"
CONFIG = ROOT / "launch" / "config_schema.json"


def to_draft_07(node: Any) -> Any:
    """A part of pydantic's schema (draft 2020-12) in the words of draft-07, which is what Helm 3 reads."""
    if isinstance(node, list):
        return [to_draft_07(item) for item in node]
    if not isinstance(node, dict):
        return node
    words = {"prefixItems": "items", "$defs": "definitions"}
    changed = {words.get(key, key): to_draft_07(value) for key, value in node.items()}
    if isinstance(changed.get("$ref"), str):
        changed["$ref"] = changed["$ref"].replace("#/$defs/", "#/definitions/")
    return changed


def with_config(values: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The chart's schema with its definition ``Config``, and those under it, replaced.

    The chart's own definitions begin in lower case, those of the configuration in upper case.
    """
    config = to_draft_07(config)
    parts = config.pop("definitions")
    own = {name: part for name, part in values["definitions"].items() if name[0].islower()}
    return values | {"definitions": own | {"Config": config} | parts}


def schema_text() -> str:
    values, config = (json.loads(path.read_text(encoding="utf-8")) for path in (VALUES, CONFIG))
    return json.dumps(with_config(values, config), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    VALUES.write_text(schema_text(), encoding="utf-8")
