"""Writes ``launch/config_schema.json``, for editors and for the chart's values: ``make schema``."""

from __future__ import annotations

import json
from pathlib import Path

from launch.config import Config

PATH = Path(__file__).with_name("config_schema.json")


def schema_text() -> str:
    return json.dumps(Config.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(schema_text(), encoding="utf-8")
