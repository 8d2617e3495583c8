"""A real Prometheus: Debian's package, fetched once without installing it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.local_processes import free_port

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.prefix) / "tools" / "prometheus"
ALERTS = ROOT / "helm" / "baton" / "files" / "alerts.yaml"
DASHBOARD = ROOT / "helm" / "baton" / "files" / "dashboard.json"


def tool(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``: the machine's own, else out of Debian's package.

    Without either the test is skipped; with BATON_REQUIRE_TOOLS set it fails.
    """
    if found := shutil.which(name):
        return found
    path = TOOLS / "usr" / "bin" / name
    if not path.exists() and (problem := _fetch()):
        message = f"no {name} here, and Debian's package can't be had: {problem}"
        if os.environ.get("BATON_REQUIRE_TOOLS"):
            pytest.fail(message)
        pytest.skip(message)
    return str(path)


def _fetch() -> str:
    """Unpack the package under the virtual environment. Returns what went wrong, empty if nothing."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return "this is not Debian"
    aside = TOOLS.with_name(f"prometheus.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        download = ["apt-get", "download", "prometheus"]
        done = subprocess.run(download, cwd=aside, capture_output=True, text=True, check=False)
        if done.returncode:  # a machine that has never asked what there is
            subprocess.run(["apt-get", "update"], capture_output=True, check=False)
            done = subprocess.run(download, cwd=aside, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr.strip()
        (package,) = aside.glob("prometheus_*.deb")
        subprocess.run(["dpkg", "-x", package, aside], check=True)
        package.unlink()
        if not TOOLS.exists():
            aside.rename(TOOLS)
        return ""
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def promtool(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [tool("promtool"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _get(self, path: str, **parameters: Any) -> Any:
        query = urllib.parse.urlencode(parameters, doseq=True)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            body = json.load(answer)
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self._get("query", query=expression)["result"]

    def query_range(self, expression: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        return self._get("query_range", query=expression, start=start, end=end, step=step_s)["result"]

    def samples(self, selector: str) -> dict[tuple[tuple[str, str], ...], list[tuple[float, float]]]:
        """Every sample of the last hour as it was scraped: (time, value) by series."""
        return {
            tuple(sorted(series["metric"].items())): [(time, float(value)) for time, value in series["values"]]
            for series in self.query(f"{selector}[1h]")
        }

    def label_values(self, label: str, selector: str) -> list[str]:
        return self._get(f"label/{label}/values", **{"match[]": selector})

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def latest(self, name: str) -> float | None:
        """The newest value of a metric, if there is one."""
        found = self.query(f"max(last_over_time({name}[1h]))")
        return float(found[0]["value"][1]) if found else None

    def wait_for(self, expression: str, timeout_s: float) -> None:
        """Until the query has a result."""
        deadline = time.monotonic() + timeout_s
        while not self.query(expression):
            assert time.monotonic() < deadline, f"{expression} gave nothing within {timeout_s} s"
            time.sleep(0.2)


@contextmanager
def prometheus(folder: Path, target: str, *, job: str, every: str) -> Iterator[Prometheus]:
    """A server that scrapes ``target`` and evaluates the chart's alerts."""
    config = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": job, "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"),
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(f"http://{address}", process, folder / "prometheus.log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
