"""The chart's dashboard and alerts as files: valid, complete, and about metrics that exist."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from cluster.run_metrics import COUNTERS, GAUGES, STEP_SECONDS
from tests.support.prometheus import ALERTS, DASHBOARD, promtool

COUNTER_NAMES = {f"{name}_total" for name in (*COUNTERS, STEP_SECONDS)}
NAMES = COUNTER_NAMES | set(GAUGES) | {"baton_run_state"}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bbaton_[a-z_]+", text))


def test_dashboard_follows_grafanas_schema(dashboard: dict[str, Any]) -> None:
    if "BATON_SHARED" not in os.environ:
        pytest.skip("BATON_SHARED is not set, so Grafana's dashboard schema is not at hand")
    schema = Path(os.environ["BATON_SHARED"]) / "schemas" / "grafana-dashboard.jsonschema.json"
    validator = Draft7Validator(json.loads(schema.read_text()))
    assert [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(dashboard)] == []
    assert list(validator.iter_errors(dashboard | {"panels": [{"title": "no type"}]})), "the schema can refuse"


def test_every_panel_can_be_read_by_a_stranger(dashboard: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles) > 10
    for panel in dashboard["panels"]:
        assert panel["type"] in ("timeseries", "stat") and len(panel["description"]) > 15, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["datasource"]["uid"] == "${datasource}"
        assert all(target["legendFormat"] and "{{run}}" in target["legendFormat"] for target in panel["targets"])
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "run"] and variables["datasource"]["type"] == "datasource"


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + i, grid["y"] + j) for i in range(grid["w"]) for j in range(grid["h"])}
        assert not cells & taken and grid["x"] + grid["w"] <= 24, panel["title"]
        taken |= cells


def test_queries_are_about_metrics_that_exist(dashboard: dict[str, Any]) -> None:
    """Every metric is on the dashboard; each is filtered by job and run; counters stand under rate or increase, but
    where the whole life of a run is meant."""
    found = expressions(dashboard)
    assert names_in(" ".join(found)) == NAMES
    for expression in found:
        selectors = re.findall(r"\bbaton_[a-z_]+(\{[^}]*\})?", expression)
        assert selectors and all('job=~"$job", run=~"$run"' in selector for selector in selectors), expression
        for counter in names_in(expression) & COUNTER_NAMES:
            ranged = re.search(rf"(rate|increase)\({counter}\{{[^}}]*\}}\[\$__rate_interval\]\)", expression)
            whole_life = expression.startswith("1 - baton_lost_steps_total")
            assert ranged or whole_life, expression


def test_alerts_say_what_to_do() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 3
    for rule in rules:
        assert names_in(rule["expr"]) and names_in(rule["expr"]) <= NAMES
        assert rule["labels"]["severity"] in ("warning", "critical") and "for" in rule
        assert "{{ $labels.run }}" in rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 80


def test_alerts_hold_what_they_promise() -> None:
    tests = Path(__file__).parent / "alerts.test.yaml"
    for arguments in (("check", "rules", str(ALERTS)), ("test", "rules", str(tests))):
        done = promtool(*arguments)
        assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_a_weakened_alert_is_caught(tmp_path: Path) -> None:
    """The tests of the alerts can fail: each alert, made deaf, is missed by them."""
    tests = (Path(__file__).parent / "alerts.test.yaml").read_text()
    (tmp_path / "alerts.test.yaml").write_text(tests.replace("../../helm/baton/files/", ""))
    rules = yaml.safe_load(ALERTS.read_text())
    for rule in rules["groups"][0]["rules"]:
        whole = rule["expr"]
        rule["expr"] = f"({whole}) and vector(1) == 2"
        (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
        assert promtool("test", "rules", str(tmp_path / "alerts.test.yaml")).returncode != 0, rule["alert"]
        rule["expr"] = whole


def test_docs_name_every_metric_and_alert() -> None:
    text = DOCS.read_text()
    assert set(re.findall(r"`(baton_[a-z_]+)", text)) >= NAMES
    for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]:
        assert f"`{rule['alert']}`" in text
