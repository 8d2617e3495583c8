"""A real S3 server on the loopback: moto's, in a virtual environment of its own.

Of its own, because botocore, which it needs, wants an older python-dateutil than Baton's pinned one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster.local_processes import free_port

TOOLS = Path(sys.prefix) / "tools" / "moto"
PACKAGES = ("moto[s3]==5.1.4", "flask>=3", "flask-cors>=5")
"""One version, that was tried: 5.2.1 ends multipart uploads with an answer that S3 never gives, an error to Arrow."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


def server_command() -> str:
    """Path of ``moto_server``, installed on first use.

    Where it can't be had the test is skipped; with BATON_REQUIRE_TOOLS set it fails.
    """
    path = TOOLS / "bin" / "moto_server"
    if not path.exists() and (problem := _install()):
        message = f"no S3 server here: moto can't be installed: {problem}"
        (pytest.fail if os.environ.get("BATON_REQUIRE_TOOLS") else pytest.skip)(message)
    return str(path)


def _install() -> str:
    """Returns what went wrong, empty if nothing. Whole or not at all: the last file to appear is the command."""
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(TOOLS)],
        [str(TOOLS / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(TOOLS, ignore_errors=True)
            return done.stderr.strip()[-500:]
    return ""


class S3Server:
    """Listens on a free port of the loopback, and holds nothing yet. What it holds is lost when it ends."""

    def __init__(self, log: Path) -> None:
        self.port = free_port()
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end(signal.SIGTERM)

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [server_command(), "-H", "127.0.0.1", "-p", str(self.port)],
                env=os.environ | CREDENTIALS,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._await(self._process)
        except BaseException:
            self._end(signal.SIGKILL)
            raise

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(10)

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError) as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server did not start: {self._log.read_text()[-2000:]}") from error
                time.sleep(0.1)


def create_bucket(port: int, name: str) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()


def s3_uri(bucket: str, path: str, port: int) -> str:
    return f"s3://{bucket}/{path}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
