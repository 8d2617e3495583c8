"""Wishes that an attempt make way: how they reach ranks and driver, and what follows."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError

from cluster import ray_nodes, ray_session, ray_watch
from cluster.config import ClusterConfig, WorkerBounds
from cluster.failures import Action, AttemptEnd, EndKind, decide
from cluster.launcher import Past
from cluster.notice_server import TOKEN, NoticeServer
from cluster.ray_nodes import bundles_that_fit
from cluster.ray_room import Room
from cluster.ray_session import Session
from cluster.ray_train import room_was_taken
from cluster.ray_watch import Watch, leaving_request
from data_shards.errors import BadInput
from launch.config import load_config
from trainer.config import WorkerSpec
from trainer.events import EventKind, EventLog
from trainer.metrics import NoMetrics
from trainer.run_directory import RunDirectory, StopKind, StopRequest
from trainer.stop_signal import StopSignal, deadline_in


def until(found: Callable[[], Any], timeout_s: float = 10) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_what_is_asked_comes_back(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    assert run.stop_request("a1") is None
    run.request_stop("a1", "room for more", StopKind.RESIZE, deadline=17.5)
    assert run.stop_request("a1") == StopRequest("room for more", StopKind.RESIZE, 17.5)


@pytest.mark.parametrize("text", ["", "{", '{"reason": "of an older release"}', '{"kind": "of a later one"}'])
def test_whatever_is_there_is_a_wish_to_stop(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "attempts" / "a1"
    folder.mkdir(parents=True)
    (folder / "stop.json").write_text(text)
    request = RunDirectory.at(str(tmp_path)).stop_request("a1")
    assert request is not None and request.kind == StopKind.STOP and request.deadline is None


def test_rank_zero_hears_of_it_and_how_long_there_is(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    signal = StopSignal(run, "a1", rank=0)
    assert not signal.requested and signal.seconds_left == float("inf")
    run.request_stop("a1", "stop", deadline=time.time() + 100)
    until(lambda: signal.requested)
    assert 90 < signal.seconds_left <= 100
    run.request_stop("a1", "sooner", deadline=time.time() - 1)
    until(lambda: signal.seconds_left == 0)
    signal.close()


def test_any_rank_sees_the_notice_on_its_machine_and_tells_the_driver(tmp_path: Path) -> None:
    run, file = RunDirectory.at(str(tmp_path / "run")), tmp_path / "leaving"
    signal = StopSignal(run, "a1", 3, str(file), node="node-7")
    time.sleep(1.2)
    assert not signal.requested and run.notices("a1") == {}
    file.write_text("25 seconds\n")
    until(lambda: bool(run.notices("a1")))
    assert signal.requested and 20 < signal.seconds_left <= 25
    ((node, request),) = run.notices("a1").items()
    assert node == "node-7" and request.kind == StopKind.PREEMPTED and str(file) in request.reason
    signal.close()


def test_a_notice_is_heeded_though_the_storage_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told there, and asked, is tried again for longer than there is."""
    run, file, held = RunDirectory.at(str(tmp_path / "run")), tmp_path / "leaving", threading.Event()
    for name in ("notify", "stop_request"):
        monkeypatch.setattr(RunDirectory, name, lambda *_: held.wait(30) and None)
    file.write_text("25")
    signal = StopSignal(run, "a1", 0, str(file))
    until(lambda: signal.requested)
    assert 20 < signal.seconds_left <= 25 and not held.is_set()
    signal.close()
    held.set()


@pytest.mark.parametrize(
    ("text", "left"),
    [("30", 30), ("2.5 s", 2.5), ("-4", 0), ("", None), ("soon", None), ("inf", None), ("nan", None), ("1e300", None)],
)
def test_seconds_in_a_notice_file(tmp_path: Path, text: str, left: float | None) -> None:
    path = tmp_path / "leaving"
    path.write_text(text)
    found = deadline_in(path)
    assert (found is None) == (left is None)
    assert left is None or found == pytest.approx(time.time() + left, abs=1)


def test_seconds_count_from_when_the_notice_was_written(tmp_path: Path) -> None:
    """It may have come while the model was read."""
    path = tmp_path / "leaving"
    path.write_text("120")
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert deadline_in(path) == pytest.approx(time.time() + 20, abs=1)


def test_a_folder_that_may_not_be_entered_hides_no_other_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists

    def refuse(path: Path) -> bool:
        if path.name == "leaving":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    run = RunDirectory.at(str(tmp_path))
    signal = StopSignal(run, "a1", 0, str(tmp_path / "leaving"))
    time.sleep(1.2)
    run.request_stop("a1", "stop")
    until(lambda: signal.requested)
    signal.close()


@dataclass
class Lookout:
    """A watch whose node and cluster are this test's."""

    run: RunDirectory
    told: list[StopRequest] = field(default_factory=list)

    def watch(self, **options: Any) -> Watch:
        bounds = WorkerBounds(min=1, max=3, grow_after_s=0)
        return Watch(self.run, "a1", 2, bounds, lambda number: 4 - number, self.told.append, "here", **options)


@pytest.fixture
def lookout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lookout:
    monkeypatch.setattr(ray_nodes, "draining", dict)
    monkeypatch.setattr(ray_watch, "POLL_SECONDS", 0.02)
    return Lookout(RunDirectory.at(str(tmp_path)))


def test_where_the_driver_goes_the_run_stops(lookout: Lookout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though no rank is there: nobody would be left to begin another attempt."""
    monkeypatch.setattr(ray_nodes, "draining", lambda: {"here": 77.0})
    with lookout.watch().watching():
        until(lambda: lookout.told)
    assert [(request.kind, request.deadline) for request in lookout.told] == [(StopKind.STOP, 77.0)]


def test_a_notice_file_beside_the_driver_stops_the_run(lookout: Lookout, tmp_path: Path) -> None:
    with lookout.watch(notice_file=str(tmp_path / "leaving")).watching():
        time.sleep(0.1)
        assert not lookout.told
        (tmp_path / "leaving").write_text("20")
        until(lambda: lookout.told)
    assert lookout.told[0].kind == StopKind.STOP and lookout.told[0].deadline is not None


def test_room_for_more_is_looked_for_once_it_trains(lookout: Lookout) -> None:
    with lookout.watch().watching():
        time.sleep(0.3)
        assert not lookout.told, "what was loaded for minutes would be thrown away"
        EventLog(lookout.run, "a1").record(EventKind.TRAINING, "from step 0")
        until(lambda: lookout.told)
    assert [request.kind for request in lookout.told] == [StopKind.RESIZE]


@pytest.fixture
def demanded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many workers Ray is asked for; asked in earnest, it would start a cluster in this process."""
    numbers: list[int] = []

    def ask(self: Room, num_workers: int, out: frozenset[str]) -> AbstractContextManager[None]:
        numbers.append(num_workers)
        return nullcontext()

    monkeypatch.setattr(Room, "_asked_for", ask)
    return numbers


@pytest.mark.usefixtures("demanded")
def test_gpus_of_the_run_so_far_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes may still be joining."""
    said: list[str] = []
    there = [{"a": {"CPU": 8.0}}]
    monkeypatch.setattr(ray_nodes, "staying", lambda: there[-1])
    on_gpus = Past(has_begun=True, on_gpus=True)
    room = Room(ClusterConfig(num_workers=2, wait_for_capacity_s=60), others_may_join=False)
    room.check_capacity(said.append, Past())
    assert "GPU" not in room.bundle
    with pytest.raises(BadInput, match=r"1 GPU each \(the run has trained on GPUs so far\. .* has 8 CPU, 0 GPU"):
        room.check_capacity(said.append, on_gpus)
    room = Room(ClusterConfig(num_workers=2, wait_for_capacity_s=30))
    room.check_capacity(said.append, on_gpus)
    assert room.bundle["GPU"] == 1, "they are waited for before the attempt"
    room = Room(ClusterConfig(num_workers=2, use_gpu=False))
    room.check_capacity(said.append, on_gpus)
    assert "GPU" not in room.bundle, "on purpose"


@pytest.mark.usefixtures("demanded")
def test_gpus_that_come_a_little_later_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new run would else begin, and stay, on the processors of the head."""
    said: list[str] = []
    there = [{"a": {"CPU": 8.0}}]
    monkeypatch.setattr(ray_nodes, "staying", lambda: there[-1])
    room = Room(ClusterConfig(num_workers=2, wait_for_capacity_s=0.2))
    room.check_capacity(said.append, Past())
    assert "GPU" not in room.bundle, "none comes"
    assert len(said) == 1 and "0.2 s (cluster.wait_for_capacity_s) for a node with a GPU" in said[0]
    room = Room(ClusterConfig(num_workers=2, wait_for_capacity_s=30))
    room.check_capacity(said.append, Past(has_begun=True, on_gpus=False))
    assert "GPU" not in room.bundle, "it has trained without"
    threading.Timer(0.6, there.append, [{"a": {"CPU": 8.0}, "b": {"CPU": 8.0, "GPU": 2.0}}]).start()
    room.check_capacity(said.append, Past())
    assert room.bundle["GPU"] == 1


def test_a_run_that_has_begun_waits_for_its_machines(monkeypatch: pytest.MonkeyPatch, demanded: list[int]) -> None:
    said: list[str] = []
    monkeypatch.setattr(ray_nodes, "staying", lambda: {"a": {"CPU": 1.0}})
    room = Room(ClusterConfig(num_workers=2, use_gpu=False, wait_for_capacity_s=0))
    with pytest.raises(BadInput, match=r"cluster\.num_workers=2 with 1 CPU each can't be placed: .* room for 1"):
        room.check_capacity(said.append, Past())
    assert demanded == [2], "for an autoscaler"
    room.check_capacity(said.append, Past(has_begun=True))
    unknown = Room(ClusterConfig(num_workers=2, wait_for_capacity_s=0))
    with pytest.raises(BadInput, match="room for 1"):  # it would begin without the GPUs that may yet come
        unknown.check_capacity(said.append, Past(has_begun=True))
    unknown.check_capacity(said.append, Past(has_begun=True, on_gpus=False))


def test_room_that_others_took_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    late = ControllerError(WorkerGroupStartupTimeoutError(2))
    room = Room(ClusterConfig(num_workers=2))
    monkeypatch.setattr(ray_nodes, "staying", lambda: {"a": {"CPU": 4.0}})
    monkeypatch.setattr(ray_nodes, "free", lambda: {"a": {"CPU": 1.0}})
    assert room_was_taken(late, room, 2)
    assert not room_was_taken(ControllerError(RuntimeError("of its own")), room, 2)
    assert not room_was_taken(RayError("the board is gone"), room, 2)
    monkeypatch.setattr(ray_nodes, "free", lambda: {"a": {"CPU": 2.0}})
    assert not room_was_taken(late, room, 2), "there it could have begun"


def test_a_supervisor_that_tells_nothing_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its child sits in a driver's call and outlives SIGKILL."""
    monkeypatch.setattr(ray_session, "GRACE_S", 0.2)
    monkeypatch.setattr(ray_session, "KILL_S", 0.2)
    asked: list[str] = []

    def ask(self: Session, method: str, *_: Any) -> Any:
        asked.append(method)
        return {0: "exited with 1"} if method == "ends" else None

    monkeypatch.setattr(Session, "_ask", ask)
    session = Session(None, 2, Future())
    spec = WorkerSpec.model_construct()
    lost = session.run(spec, NoMetrics())
    assert "rank 0 exited with 1; rank 1 has told nothing since it was cut off" in lost and "cut_off" in asked
    assert not session.is_alive, "the next attempt gets others"


def made_way(start: int, committed: int, kind: EndKind = EndKind.STOPPED) -> AttemptEnd:
    return AttemptEnd(kind, start, committed, making_way="node 4 will be taken away")


def test_a_run_goes_on_after_it_made_way() -> None:
    assert decide([made_way(0, 5)], 2, stop_wanted=False).action == Action.RETRY
    assert decide([made_way(0, 5)], 2, stop_wanted=True).action == Action.STOP_RESUMABLE
    assert decide([AttemptEnd(EndKind.STOPPED, 0, 5)], 2, stop_wanted=True).action == Action.STOP_RESUMABLE


def test_machines_that_go_before_anything_is_committed_are_no_failures() -> None:
    storm = [made_way(5, 5), made_way(5, 5, EndKind.FAILED)] * 5
    decision = decide(storm, 2, stop_wanted=False)
    assert decision.action == Action.RETRY and decision.delay_s == 0
    failed = AttemptEnd(EndKind.FAILED, 5, 5)
    assert decide([*storm, failed, failed, failed], 2, stop_wanted=False).action == Action.FAIL


def test_only_nodes_with_ranks_matter() -> None:
    nodes = {0: "aaaaaaaaaa", 1: "bbbbbbbbbb", 2: "bbbbbbbbbb"}
    assert leaving_request({}, nodes) is None and leaving_request({"c": 5.0}, nodes) is None
    assert leaving_request({"aaaaaaaaaa": 5.0}, {}) is None, "nobody has said where he is"
    request = leaving_request({"bbbbbbbbbb": 9.0, "aaaaaaaaaa": None, "c": 5.0}, nodes)
    assert request is not None and request.kind == StopKind.PREEMPTED and request.deadline == 9.0
    assert "rank 0, 1, 2" in request.reason and "aaaaaaaa, bbbbbbbb" in request.reason


def test_workers_lie_on_one_node_each() -> None:
    assert bundles_that_fit([{"CPU": 3.0}, {"CPU": 1.0, "GPU": 2.0}], {"CPU": 2.0, "GPU": 0.0}) == 1
    assert bundles_that_fit([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], {"CPU": 1.0, "GPU": 1.0}) == 2


class Asked:
    """A notice server and what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float | None]] = []
        self.server = NoticeServer(0, self.tell)

    def tell(self, node: str, seconds: float | None) -> bool:
        self.told.append((node, seconds))
        return node == "here"

    def post(self, body: Any, token: str = "right", path: str = "/notice") -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.server.port}{path}",
            data=body if isinstance(body, bytes) else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}"},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    monkeypatch.setenv(TOKEN, "right")
    made = Asked()
    yield made
    made.server.close()


def test_notices_by_http(asked: Asked) -> None:
    assert asked.post({"node": "here", "seconds": 30}) == 202
    assert asked.post({"node": "here"}) == 202
    assert asked.post({"node": "elsewhere", "seconds": 1.5}) == 404
    assert asked.told == [("here", 30.0), ("here", None), ("elsewhere", 1.5)]


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"\xff", {"node": "here", "seconds": "soon"}, b" " * 5000])
def test_a_notice_that_says_nothing_is_refused(asked: Asked, body: Any) -> None:
    assert asked.post(body) == 400 and asked.told == []


@pytest.mark.parametrize("seconds", ["inf", float("inf"), float("nan"), -1, 1e300, pytest.param(10**400, id="huge")])
def test_seconds_that_are_no_time_are_refused(asked: Asked, seconds: Any) -> None:
    """Else Ray would be told to drain until then, and nobody who gave notice would hear that it failed."""
    assert asked.post({"node": "here", "seconds": seconds}) == 400 and asked.told == []


def test_a_notice_needs_the_token(asked: Asked) -> None:
    assert asked.post({"node": "here"}, token="guessed") == 401
    assert asked.post({"node": "here"}, token="rightt") == 401
    assert asked.post({"node": "here"}, path="/metrics") == 404
    assert asked.told == []


def test_without_a_token_no_port_is_opened(monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    with pytest.raises(BadInput, match=f"cluster.notice_port={asked.server.port}: Address already in use"):
        NoticeServer(asked.server.port, asked.tell)
    monkeypatch.delenv(TOKEN)
    with pytest.raises(BadInput, match=f"needs a token in the environment variable {TOKEN}"):
        NoticeServer(0, asked.tell)


def test_bounds_of_workers() -> None:
    elastic = ClusterConfig.model_validate({"workers": {"min": 2, "max": 8}})
    assert (elastic.min_workers, elastic.num_workers) == (2, 8)
    assert ClusterConfig.model_validate(elastic.model_dump(mode="json")) == elastic
    fixed = ClusterConfig.model_validate({"num_workers": 3})
    assert (fixed.min_workers, fixed.num_workers) == (3, 3)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("cluster.workers={min: 3, max: 2}", "min=3 is more than max=2"),
        ("cluster.workers={min: 3}", "cluster.workers.max"),
        ("cluster={workers: {max: 2}, num_workers: 4}", "contradict each other"),
        ("cluster={workers: {max: 2}, launcher: processes}", "launcher=ray"),
    ],
)
def test_bounds_that_make_no_sense(tmp_path: Path, override: str, problem: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {base: b}\ndata: {train: t.jsonl}\n")
    with pytest.raises(BadInput, match=problem):
        load_config(str(config), [override])
