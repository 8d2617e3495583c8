"""A Ray cluster whose nodes have addresses and folders of their own, on one machine: network and mount namespaces."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.command import environment

BIN = Path(sys.executable).parent
_PORT = 6379


def skip_unless_allowed() -> None:
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command (iproute2)")
    name = f"baton-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this user may not make network namespaces: {done.stderr}")
    _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Machine:
    """A namespace with an address, and, once something of Ray runs in it, a node."""

    name: str
    address: str
    disk: Path
    """what it sees at ``Network.disk``"""
    temp: Path
    """Ray's own files"""
    hidden: Path | None = None
    """a folder that it sees empty, as where a mount is missing"""
    process: subprocess.Popen[bytes] | None = None

    def within(self, shown_at: Path) -> list[str]:
        """A command line's beginning that runs the rest there."""
        hiding = f"mount -t tmpfs none {self.hidden} && " if self.hidden is not None else ""
        script = f'mount --make-rprivate / && mount --bind {self.disk} {shown_at} && {hiding}exec "$@"'
        return ["ip", "netns", "exec", self.name, "sh", "-c", script, "sh"]

    def pids(self, part: str) -> list[int]:
        """Of its processes whose command line holds this."""
        done = subprocess.run(["ip", "netns", "pids", self.name], check=False, capture_output=True, text=True)
        found = []
        for pid in map(int, done.stdout.split()):
            with suppress(OSError):
                if part in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(pid)
        return found

    def kill_all(self) -> None:
        """As when the machine loses power."""
        deadline = time.monotonic() + 20
        while (pids := self.pids("")) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.process is not None:
                self.process.poll()
            time.sleep(0.05)
        if self.process is not None:
            self.process.wait(10)


@dataclass
class Network:
    """Machines on a bridge; the first is the head."""

    base: Path
    disk: Path
    """a path at which each machine sees a folder of its own"""
    environment: dict[str, str]
    number: int = field(default_factory=lambda: random.randrange(1, 250))
    machines: list[Machine] = field(default_factory=list)

    @property
    def bridge(self) -> str:
        return f"bt{self.number}"

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{self.machines[0].address}:{_PORT}"

    def add_machine(self) -> Machine:
        index = len(self.machines)
        name, near = f"{self.bridge}-{index}", f"{self.bridge}v{index}"
        machine = Machine(
            name,
            f"10.77.{self.number}.{index + 1}",
            self.base / f"disk-{index}",
            Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp")),  # Ray's sockets need a short path
        )
        machine.disk.mkdir()
        _ip("netns", "add", name)
        self.machines.append(machine)
        _ip("link", "add", near, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", near, "master", self.bridge, "up")
        _ip("-n", name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return machine

    def start_head(self, num_cpus: int = 0) -> Machine:
        machine = self.add_machine()
        options = ["--head", f"--port={_PORT}", "--dashboard-host=0.0.0.0", "--dashboard-port=8265"]
        self._start(machine, num_cpus, options)
        deadline = time.monotonic() + 60
        while not self._answers(machine):
            assert machine.process is not None and machine.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        return machine

    def start_node(self, num_cpus: int, hidden: Path | None = None) -> Machine:
        machine = self.add_machine()
        machine.hidden = hidden
        self._start(machine, num_cpus, [f"--address={self.address}"])
        return machine

    def _start(self, machine: Machine, num_cpus: int, options: list[str]) -> None:
        command = [
            *(*machine.within(self.disk), str(BIN / "ray"), "start", "--block", f"--num-cpus={num_cpus}", *options),
            *(f"--node-ip-address={machine.address}", f"--temp-dir={machine.temp}", "--object-store-memory=80000000"),
        ]
        log = (self.base / f"{machine.name}.log").open("wb")
        machine.process = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def _answers(self, machine: Machine) -> bool:
        script = f"import socket; socket.create_connection(('{machine.address}', {_PORT}), 1)"
        command = [*machine.within(self.disk), sys.executable, "-c", script]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def close(self) -> None:
        for machine in self.machines:
            machine.kill_all()
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", machine.name)
            shutil.rmtree(machine.temp, ignore_errors=True)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", self.bridge)


@contextmanager
def network(base: Path, **extra: str) -> Iterator[Network]:
    """An empty one, all of whose processes are gone in the end."""
    skip_unless_allowed()
    env = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_health_check_period_ms="500",  # a lost node is noticed in seconds
        RAY_health_check_timeout_ms="1000",
        RAY_health_check_failure_threshold="3",
        RAY_prestart_worker_first_driver="0",
        GLOO_SOCKET_IFNAME="eth0",
        OMP_NUM_THREADS="1",
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
        **extra,
    )
    disk = base / "disk"
    disk.mkdir(parents=True)
    made = Network(base, disk, env)
    try:
        _ip("link", "add", made.bridge, "type", "bridge")
        _ip("link", "set", made.bridge, "up")
        yield made
    finally:
        made.close()
