"""A run on Ray nodes that come and go, each with an address and folders of its own; the head has no room for workers.

In turn: a node dies, one joins that does not see the runs and one that does, that is drained by a notice at the
driver's port, one gets SIGTERM, one tells by a file and too late, and the driver is told to stop. After each the run
goes on with whatever nodes there are.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch import finetune, prepare
from tests.integration.conftest import Workshop
from tests.integration.test_killed_prepare import contents
from tests.support.command import Command, RunFiles, run_here, slowed_tree, write_config
from tests.support.ray_network import BIN, Machine, Network, network
from trainer.events import Event, read_events
from trainer.run_directory import AttemptStart, RunDirectory

pytestmark = pytest.mark.timeout(1200)

RUN, EVERY, ENDLESS = "traveller", 10, 5_000
OUTPUT = "output-of-the-first-submission"
"""A file beside the configuration, for the page of faults."""
NOTICE_PORT, NOTICE_TOKEN = 9470, "0f3c-of-this-test"


def values_of(workshop: Workshop, **cluster: Any) -> dict[str, Any]:
    return workshop.values | {
        "data": dict(workshop.values["data"]),
        "model": workshop.values["model"] | {"config_overrides": {}},
        "training": {"global_batch": 4, "micro_batch": 2, "steps": ENDLESS, "log_every": 1},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "checkpoint": {"every_steps": EVERY, "keep_last": 2},
        "evaluation": {"every_steps": None},
        "export": {"at_end": False},
        "metrics": {"port": 0},
        "cluster": cluster,
    }


@dataclass
class Voyage:
    """One submission after another of the run, and what is known of its attempts."""

    net: Network
    config: Path
    tree: Path
    files: RunFiles
    command: Command | None = None
    refused: str = ""
    """what the command said where nodes did not see the data"""
    output: str | None = None
    """of the first submission that was not refused"""
    told: dict[str, int] = field(default_factory=dict)
    """by what befell it, the number of the attempt that it befell"""

    def submit(self, *overrides: str) -> None:
        ray = {name: value for name, value in self.net.environment.items() if name.startswith(("RAY", "GLOO", "OMP"))}
        self.command = Command(
            "finetune",
            *("--config", str(self.config), *overrides),
            tree=self.tree,
            cwd=self.tree.parent,
            within=self.net.machines[0].within(self.net.disk),
            RAY_ADDRESS=self.net.address,
            BATON_NOTICE_TOKEN=NOTICE_TOKEN,
            **ray,
        )

    def wait_for(self, pattern: str, timeout_s: float = 120) -> re.Match[str]:
        assert self.command is not None
        return self.command.wait_for(pattern, timeout_s)

    def begins(self, number: int, workers: int) -> int:
        """Until an attempt has taken three steps; returns the one that it began with."""
        found = self.wait_for(
            rf"attempt {number} \(\w+\): (?:resuming from step (\d+)|from the beginning), (\d+) workers"
        )
        start = int(found[1] or 0)
        assert int(found[2]) == workers, found[0]
        self.wait_for(rf"step {start + 3}/\d+  loss")
        return start

    def attempts(self) -> list[AttemptStart]:
        return RunDirectory.at(str(self.files.path)).lineage()

    def events(self, number: int) -> list[Event]:
        run = RunDirectory.at(str(self.files.path))
        return read_events(run, self.attempts()[number - 1].attempt)

    def last_step(self, number: int) -> int:
        """That an attempt has recorded."""
        folder = self.files.path / "attempts" / self.attempts()[number - 1].attempt / "steps"
        lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
        return max(json.loads(line)["step"] for line in lines)


def give_notice(net: Network, node: str, seconds: float, token: str) -> int:
    """Through the driver's port, from the head's machine. Returns the HTTP status."""
    script = (
        "import json, sys, urllib.request, urllib.error\n"
        f"request = urllib.request.Request('http://127.0.0.1:{NOTICE_PORT}/notice', method='POST',\n"
        f"    data=json.dumps({{'node': '{node}', 'seconds': {seconds}}}).encode(),\n"
        f"    headers={{'Authorization': 'Bearer {token}'}})\n"
        "try:\n    print(urllib.request.urlopen(request, timeout=20).status)\n"
        "except urllib.error.HTTPError as error:\n    print(error.code)\n"
    )
    command = [*net.machines[0].within(net.disk), str(BIN / "python"), "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.fixture(scope="module")
def voyage(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Voyage]:
    base = tmp_path_factory.mktemp("nodes")
    with network(base / "net") as net:
        bounds = {"min": 1, "max": 2, "settle_s": 5, "grow_after_s": 4}
        values = values_of(
            workshop,
            workers=bounds,
            cpus_per_worker=1,
            use_gpu=False,
            wait_for_capacity_s=60,
            notice_file=str(net.disk / "leaving"),
            notice_port=NOTICE_PORT,
        )
        values["data"] |= {"prepared": str(workshop.data / "prepared-by-nodes")}
        net.start_head()
        one, two = net.start_node(num_cpus=1), net.start_node(num_cpus=1)
        config = write_config(base, values, RUN)
        files = RunFiles(workshop.data / "runs" / RUN)
        made = Voyage(net, config, slowed_tree(base, 0.1), files)
        try:
            travel(made, one, two)
            yield made
        except BaseException:
            print(made.command.output[-12_000:] if made.command is not None else "")
            raise
        finally:
            if made.command is not None:
                made.command.kill()


def travel(voyage: Voyage, one: Machine, two: Machine) -> None:
    net, told = voyage.net, voyage.told
    voyage.submit(f"data.prepared={net.disk / 'prepared'}")
    assert voyage.command is not None
    assert voyage.command.finish(120) == 2, voyage.command.output
    voyage.refused = voyage.command.output
    voyage.submit()
    voyage.wait_for(r"attempt 1 \(\w+\)")
    voyage.begins(1, workers=2)
    voyage.wait_for(rf"step {EVERY + 4}/\d+  loss")
    (raylet,) = two.pids("raylet/raylet")
    os.kill(raylet, signal.SIGKILL)
    told["raylet killed"] = 1
    voyage.begins(2, workers=1)
    two.kill_all()

    blind = net.start_node(num_cpus=1, hidden=voyage.files.path.parent)
    voyage.wait_for(rf"{re.escape(blind.address)} gets no workers: ")
    three = net.start_node(num_cpus=1)
    told["room for more"] = 2
    voyage.begins(3, workers=2)
    assert give_notice(net, three.address, 25, "guessed") == 401
    assert give_notice(net, "10.99.99.99", 25, NOTICE_TOKEN) == 404
    assert give_notice(net, three.address, 25, NOTICE_TOKEN) == 202
    told["drained, by a notice over HTTP"] = 3
    voyage.begins(4, workers=1)
    three.kill_all()

    four = net.start_node(num_cpus=1)
    voyage.begins(5, workers=2)
    assert four.process is not None
    four.process.terminate()
    told["SIGTERM to `ray start --block`"] = 5
    voyage.begins(6, workers=1)
    four.kill_all()

    five = net.start_node(num_cpus=1)
    start = voyage.begins(7, workers=2)
    voyage.wait_for(rf"committed step {EVERY * (start // EVERY + 1)}:")
    (five.disk / "leaving").write_text("0")
    told["notice by a file, too late"] = 7
    voyage.begins(8, workers=1)
    five.kill_all()

    assert voyage.command is not None
    voyage.command.process.send_signal(signal.SIGTERM)
    told["SIGTERM to the driver"] = 8
    assert voyage.command.finish(60) == 75, voyage.command.output
    voyage.output = voyage.command.output
    (voyage.config.parent / OUTPUT).write_text(voyage.output)
    blind.kill_all()
    reached = voyage.last_step(8)
    voyage.submit(f"training.steps={reached + 15}")
    assert voyage.command.finish(120) == 0, voyage.command.output


def test_nodes_that_do_not_see_the_data_are_named_before_any_worker_is_placed(voyage: Voyage) -> None:
    private = voyage.net.disk / "prepared"
    assert re.search(rf"prepared where the driver runs \(10\.77\.\d+\.\d+ does not see {private}/\w+\)", voyage.refused)
    assert "2 of 2 machines lack what their workers would need" in voyage.refused
    for machine in voyage.net.machines[1:3]:
        assert re.search(rf"{re.escape(machine.address)}: {private}/\w+ is not there", voyage.refused), voyage.refused
    assert "attempt" not in voyage.refused and "Traceback" not in voyage.refused


def test_a_node_that_joins_without_the_runs_gets_no_worker(voyage: Voyage) -> None:
    """Though for most of the voyage there is room for one more, there alone."""
    blind = voyage.net.machines[3]
    assert blind.hidden is not None and voyage.output is not None
    (told,) = re.findall(rf"{re.escape(blind.address)} gets no workers: (.*)", voyage.output)
    assert told == f"{voyage.files.path} is not what the driver sees there (run.storage)"
    places = [json.loads(path.read_text()) for path in voyage.files.path.glob("attempts/*/workers/*")]
    assert len({place["node"] for place in places}) == 5, "the head and it have none"
    assert not list(voyage.files.path.glob("reach-*"))


def test_data_is_prepared_by_the_processors_of_the_nodes(voyage: Voyage, workshop: Workshop) -> None:
    assert voyage.output is not None
    assert "tasks for the processors of 3 nodes" in voyage.output
    prepared = workshop.data / "prepared-by-nodes"
    (spread,) = [path for path in prepared.iterdir() if path.is_dir()]
    values = values_of(workshop, launcher="processes", num_workers=1)
    values["data"] |= {"prepared": str(workshop.data / "prepared-here")}
    here = run_here(prepare.main, "--config", str(write_config(workshop.data, values, "prepared-here")))
    assert here.code == 0, here.output
    assert contents(spread) == contents(workshop.data / "prepared-here" / spread.name)


def test_it_goes_on_with_the_nodes_there_are(voyage: Voyage) -> None:
    workers = [start.num_workers for start in voyage.attempts()]
    assert workers == [2, 1, 2, 1, 2, 1, 2, 1, 1]
    assert voyage.files.result["status"] == "finished" and voyage.files.result["attempts"] == 9


def test_ranks_are_on_machines_of_their_own_and_none_on_the_head(voyage: Voyage) -> None:
    for start in voyage.attempts():
        folder = voyage.files.path / "attempts" / start.attempt / "workers"
        places = [json.loads(path.read_text()) for path in folder.iterdir()]
        assert len({place["node"] for place in places}) == start.num_workers


@pytest.mark.parametrize(
    "befell",
    ["room for more", "drained, by a notice over HTTP", "SIGTERM to `ray start --block`", "SIGTERM to the driver"],
)
def test_with_notice_no_step_is_lost(voyage: Voyage, befell: str) -> None:
    number = voyage.told[befell]
    notices = [event for event in voyage.events(number) if event.kind == "notice"]
    saved = [event for event in voyage.events(number) if event.kind == "saved"]
    assert notices and saved and saved[0].at >= notices[0].at
    assert voyage.attempts()[number].start_step == voyage.last_step(number) == saved[0].details["step"]


def test_deadlines_are_known(voyage: Voyage) -> None:
    for befell, seconds in (("drained, by a notice over HTTP", 25), ("SIGTERM to `ray start --block`", 30)):
        (notice,) = [event for event in voyage.events(voyage.told[befell]) if event.kind == "notice"]
        assert seconds - 6 < notice.details["deadline"] - notice.at <= seconds + 1, befell


def test_without_notice_the_steps_since_the_last_commit_are_lost(voyage: Voyage) -> None:
    number = voyage.told["raylet killed"]
    start = voyage.attempts()[number].start_step
    assert voyage.output is not None
    reached = reached_without_notice(voyage.output)
    # What rank 0 printed last may have gone with its node; what it committed has not.
    assert start % EVERY == 0 and start >= EVERY and reached - start <= EVERY + 1


def reached_without_notice(output: str) -> int:
    """The last step that the first attempt has printed."""
    before, _, _ = output.partition("attempt 1 failed")
    return int(re.findall(r"step (\d+)/\d+  loss", before)[-1])


def test_where_there_is_no_time_nothing_is_torn(voyage: Voyage) -> None:
    number = voyage.told["notice by a file, too late"]
    assert not [event for event in voyage.events(number) if event.kind == "saved"]
    (skipped,) = [event for event in voyage.events(number) if event.kind == "save_skipped"]
    start = voyage.attempts()[number].start_step
    assert start % EVERY == 0 and 0 <= skipped.details["step"] - start <= 2 * EVERY
    assert voyage.attempts()[number - 1].start_step < start


def test_rows_and_losses_are_the_undisturbed_runs(voyage: Voyage, workshop: Workshop) -> None:
    """Losses but for what splitting a step otherwise changes in rounding."""
    steps = voyage.files.result["step"]
    traces = {}
    for workers, micro_batch in ((2, 2), (1, 1)):
        values = values_of(workshop, launcher="processes", num_workers=workers)
        values["training"] |= {"steps": steps, "micro_batch": micro_batch}
        name = f"still-{workers}"
        done = run_here(finetune.main, "--config", str(write_config(workshop.data, values, name)))
        assert done.code == 0, done.output
        traces[workers] = RunFiles(workshop.data / "runs" / name).trace()
    found = voyage.files.trace()
    assert [rows for *_, rows in found] == [rows for *_, rows in traces[2]] and len(found) == steps
    drift = max(abs(a - b) for (a, *_), (b, *_) in zip(traces[1], traces[2], strict=True))
    most = max(abs(a - b) for (a, *_), (b, *_) in zip(found, traces[2], strict=True))
    print(f"{steps} steps: losses differ by at most {most:.1e}; by the split alone by {drift:.1e}")
    assert most <= 3 * drift and abs(found[-1][0] - traces[2][-1][0]) <= 1e-5
