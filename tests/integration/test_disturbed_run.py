"""A Ray run loses a worker by SIGKILL, then its driver, and goes on from an edited tree, while Prometheus watches.

Promises 5 and 7: every step is bit-equal to the undisturbed run's, which ran without Ray. Promise 11: no counter falls,
the last figures are the run's, and every panel of the dashboard has something to show. On GSM8K where BATON_SHARED
leads to it, else on made records.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.local_processes import free_port
from cluster.run_metrics import COUNTERS, GAUGES, STEP_SECONDS
from launch import finetune
from launch.quickstart_inputs import make_base
from tests.integration.conftest import Workshop
from tests.support.command import Command, RunFiles, Trace, edited_tree, run_here, slowed_tree, write_config
from tests.support.prometheus import DASHBOARD, Prometheus, prometheus, promtool, tool

STEPS, COMMIT_EVERY, BATCH = 30, 10, 4
RUN = "disturbed"
COUNTER_NAMES = [f"{name}_total" for name in (*COUNTERS, STEP_SECONDS)]


@pytest.fixture(scope="module")
def values(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both runs have in common."""
    values = workshop.values | {
        "training": {"global_batch": BATCH, "micro_batch": 2, "steps": STEPS},
        "checkpoint": {"every_steps": COMMIT_EVERY, "keep_last": 2},
        "evaluation": {"every_steps": 10},
        "watchdog": {"probe_every_steps": 5},
    }
    if shared := os.environ.get("BATON_SHARED"):
        folder = tmp_path_factory.mktemp("gsm8k")
        gsm8k = Path(shared) / "data" / "gsm8k"
        for name, rows in (("train", 400), ("test", 20)):
            lines = (gsm8k / f"{name}.jsonl").read_text().splitlines()[:rows]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        texts = (folder / "train.jsonl").read_text().splitlines()
        make_base(folder / "base", texts)
        values["model"] = values["model"] | {"base": str(folder / "base")}
        values["data"] = values["data"] | {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "test.jsonl"),
            "seq_len": 384,
        }
    return values


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop, values: dict[str, Any]) -> Trace:
    config = write_config(workshop.data, values, "left-alone")
    done = run_here(finetune.main, "--config", str(config))
    assert done.code == 0, done.output
    return RunFiles(workshop.data / "runs" / "left-alone").trace()


@dataclass(frozen=True)
class Observed:
    """A run with a killed worker, a killed driver and a second command, and what was seen of it."""

    server: Prometheus
    began: float
    ended: float
    """Unix seconds"""
    files: RunFiles
    exposition: str
    """of one scrape, while it ran"""
    reached: list[int]
    """by attempt that was cut short: the last step that Prometheus saw of it; it may have gone a little further"""
    resumed: list[int]
    """by attempt after the first: the step that it began with"""


def resumed_from(command: Command, attempt: int) -> int:
    return int(command.wait_for(rf"attempt {attempt} \(\w+\): resuming from step (\d+)", timeout_s=120)[1])


@pytest.fixture(scope="module")
def observed(
    workshop: Workshop, values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observed]:
    # Two to four steps after a commit, so that each kill costs some and no commit is under way.
    worker_step = COMMIT_EVERY + random.randrange(2, 5)
    driver_step = 2 * COMMIT_EVERY + random.randrange(2, 5)
    rank, port = random.randrange(2), free_port()
    print(f"killing rank {rank} after step {worker_step}, the driver after step {driver_step}")
    tool("prometheus")
    ray = {"launcher": "ray", "num_workers": 2, "cpus_per_worker": 0.5}
    config = write_config(workshop.data, values | {"cluster": ray, "metrics": {"port": port}}, RUN)
    files = RunFiles(workshop.data / "runs" / RUN)
    folder = tmp_path_factory.mktemp("prometheus")
    slow = slowed_tree(folder, 0.3)  # workers may outlive their driver by a second; they must not finish in it
    began = time.time()
    with prometheus(folder, f"127.0.0.1:{port}", job="baton", every="250ms") as server:
        first = Command("finetune", "--config", str(config), tree=slow, cwd=folder)
        try:
            first.wait_for(rf"step {worker_step}/{STEPS} ")
            pids = re.findall(rf"worker rank {rank} of 2: pid (\d+)", first.output)
            os.kill(int(pids[-1]), signal.SIGKILL)
            first.wait_for(r"attempt 1 failed", timeout_s=90)
            reached = [int(server.latest("baton_step") or 0)]
            resumed = [resumed_from(first, 2)]
            first.wait_for(rf"step {driver_step}/{STEPS} ", timeout_s=120)
            server.wait_for(f"baton_step >= {driver_step}", timeout_s=10)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                exposition = answer.read().decode()
            assert first.process.poll() is None, "the driver must be alive to be killed"
        finally:
            first.kill()
        time.sleep(3)  # Ray's own processes notice that their driver is gone
        reached.append(int(server.latest("baton_step") or 0))
        second = Command("finetune", "--config", str(config), tree=edited_tree(folder), cwd=folder)
        resumed.append(resumed_from(second, 3))
        assert second.finish() == 0, second.output
        assert "(edited)" in second.output, "the edited tree's code must have run in the workers"
        yield Observed(server, began, time.time(), files, exposition, reached, resumed)


def test_every_step_is_the_undisturbed_runs(observed: Observed, undisturbed: Trace) -> None:
    assert all(step % COMMIT_EVERY == 0 and step >= COMMIT_EVERY for step in observed.resumed)
    assert observed.resumed[0] < observed.resumed[1], "the second attempt must have got further than the first"
    assert observed.files.trace() == undisturbed


def final(observed: Observed, name: str) -> float:
    value = observed.server.latest(name)
    assert value is not None, name
    return value


def test_no_counter_ever_fell(observed: Observed) -> None:
    series = observed.server.samples('{__name__=~"baton_.*_total"}')
    by_name: dict[str, int] = {}
    for labels, samples in series.items():
        values = [value for _, value in samples]
        assert values == sorted(values), (labels, values)
        assert dict(labels)["run"] == RUN and dict(labels)["job"] == "baton"
        by_name[dict(labels)["__name__"]] = by_name.get(dict(labels)["__name__"], 0) + 1
    assert set(by_name) == set(COUNTER_NAMES)
    assert all(count == 1 for name, count in by_name.items() if name != f"{STEP_SECONDS}_total"), by_name
    steps = next(values for labels, values in series.items() if ("__name__", "baton_steps_total") in labels)
    assert len(steps) > 40, "the server must have seen the run, not only its end"


def test_scrapes_were_answered_while_a_worker_was_lost(observed: Observed) -> None:
    """The target outlives the workers: it answered between the last step before the kill and the first after it."""
    (starting,) = observed.server.samples('baton_run_state{state="starting"}').values()
    (restarts,) = observed.server.samples("baton_restarts_total").values()
    assert {value for _, value in restarts} == {0.0, 1.0, 2.0}
    while_lost = {time for time, value in restarts if value == 1} & {time for time, value in starting if value == 1}
    assert len(while_lost) >= 3


def test_last_figures_are_the_runs(observed: Observed) -> None:
    result = observed.files.result
    assert result["status"] == "finished" and result["attempts"] == 3
    lost = final(observed, "baton_lost_steps_total")
    steps = final(observed, "baton_steps_total")
    print(f"steps {steps}, lost {lost}, reached {observed.reached}, resumed from {observed.resumed}")
    assert steps - lost == result["step"] == STEPS == final(observed, "baton_step")
    seen_lost = [max(0, was - began) for was, began in zip(observed.reached, observed.resumed, strict=True)]
    assert seen_lost[0] >= 1, "the first kill must have cost something, or nothing was tested"
    # What was seen is counted. More may be: steps told after the last scrape before a kill, and those that workers did
    # while they outlived the driver.
    assert sum(seen_lost) <= lost <= sum(seen_lost) + COMMIT_EVERY
    assert final(observed, "baton_rows_total") == BATCH * steps
    for name in ("tokens", "trained_tokens"):
        executed, kept = final(observed, f"baton_{name}_total"), result[name]
        assert kept * (1 + 0.5 * lost / STEPS) < executed < kept * (1 + 2 * lost / STEPS), "lost ones counted, too"
    assert final(observed, "baton_restarts_total") == 2
    assert final(observed, 'baton_run_state{state="finished"}') == 1, "the last scrape saw the end"
    assert final(observed, "baton_loss") == pytest.approx(result["last_loss"], rel=1e-12)
    assert final(observed, "baton_eval_loss") == pytest.approx(result["eval_loss"], rel=1e-12)


def test_checkpoints_are_counted_with_their_bytes(observed: Observed) -> None:
    """Step records are written just before each commit, so they tell how many there were; a kill in between leaves one
    more of them."""
    records = len(list(observed.files.path.glob("attempts/*/steps/*.jsonl")))
    commits = final(observed, "baton_checkpoints_total")
    assert STEPS // COMMIT_EVERY <= commits <= records <= commits + 1
    newest = observed.files.path / "checkpoints" / observed.files.result["checkpoint"]
    size = sum(path.stat().st_size for path in newest.glob("rank-*.safetensors"))
    assert final(observed, "baton_last_checkpoint_bytes") == size > 100_000
    assert final(observed, "baton_checkpoint_bytes_total") == pytest.approx(commits * size, rel=0.01)
    manifest = json.loads((newest / "manifest.json").read_text())
    age = observed.ended - final(observed, "baton_checkpoint_timestamp_seconds")
    assert 0 <= age < 60 and manifest["progress"]["step"] == final(observed, "baton_checkpoint_step") == STEPS


def test_seconds_add_up(observed: Observed) -> None:
    parts = {
        dict(labels)["part"]: samples[-1][1]
        for labels, samples in observed.server.samples(f"{STEP_SECONDS}_total").items()
    }
    assert set(parts) == {"data", "forward_backward", "optimizer", "agreement", "evaluation", "checkpoint"}
    assert all(seconds > 0 for seconds in parts.values())
    steps = [record["seconds"] for record in observed.files.steps().values()]
    in_steps = sum(parts[part] for part in ("data", "forward_backward", "optimizer", "agreement"))
    assert in_steps > 0.9 * sum(steps), "the parts of a step are nearly all of it"
    assert sum(parts.values()) < observed.ended - observed.began
    assert parts["checkpoint"] == pytest.approx(final(observed, "baton_checkpoint_seconds_total"))


def test_exposition_is_as_prometheus_wants_it(observed: Observed) -> None:
    checked = promtool("check", "metrics", stdin=observed.exposition)
    assert checked.returncode == 0 and not checked.stdout + checked.stderr, checked.stdout + checked.stderr
    for name in GAUGES:
        assert f"\n{name}{{" in observed.exposition, name


def substituted(expression: str) -> str:
    """As Grafana does it, with All chosen."""
    for variable, value in (("$job", ".+"), ("$run", ".+"), ("$__rate_interval", "10s")):
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression


def test_every_panel_has_something_to_show(observed: Observed) -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    empty = [
        f"{panel['title']}: {target['expr']}"
        for panel in dashboard["panels"]
        for target in panel["targets"]
        if not observed.server.query_range(substituted(target["expr"]), observed.began, observed.ended, 1.0)
    ]
    assert empty == []
    for annotation in dashboard["annotations"]["list"]:
        expression = substituted(annotation["expr"])
        assert observed.server.query_range(expression, observed.began, observed.ended, 1.0), expression
    assert not observed.server.query_range('baton_loss{run="another"}', observed.began, observed.ended, 1.0)


def test_variables_have_values(observed: Observed) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    found = {}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            found[variable["name"]] = observed.server.label_values(label, substituted(selector))
    assert found == {"job": ["baton"], "run": [RUN]}


def test_alerts_are_accepted_and_silent(observed: Observed) -> None:
    """A run that was killed twice and came back needs no person."""
    rules = observed.server.rules()
    assert len(rules) >= 3
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_file_holds_what_was_seen(observed: Observed) -> None:
    saved = json.loads((Path(observed.files.path) / "metrics.json").read_text())["counters"]
    assert {name: final(observed, f"{name}_total") for name in COUNTERS} == saved
