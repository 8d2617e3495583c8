"""Asking the holder of a run to stop, through its storage alone: who is asked, who heeds it, and when."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import attempts
from cluster.attempts import Submission, run_attempts
from cluster.claims import State, Timing
from cluster.failures import Action
from cluster.holder import Holder, Life, process, this_process
from cluster.lease import Lease, World, holding, take
from cluster.onlooker import Onlooker
from cluster.run_monitor import NoMonitor
from data_shards.errors import CorruptFile
from launch import finetune, stop
from tests.support.command import run_here
from tests.unit.test_run_directory import commit
from trainer.errors import RunHeld
from trainer.run_directory import RunDirectory, StopKind, StopRequest, read_json, write_json
from trainer.survey import newest_usable

QUICK = Timing(heartbeat_s=0.05, patience_s=0.5, settle_s=0.01)
ELSEWHERE = replace(this_process(), host="elsewhere", place="another boot")


def silent(line: str) -> None:
    pass


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.at(str(tmp_path))


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def held(run: RunDirectory, holder: Holder) -> Lease:
    return take(run, silent, timing=QUICK, world=World(sleep=lambda s: None, me=lambda: holder))


def ask(run: RunDirectory, reason: str = "asked to stop by a test") -> None:
    onlooker = Onlooker(run, QUICK)
    hold = onlooker.who_holds()
    assert hold is not None and hold.alive
    onlooker.ask_to_stop(hold.claim, reason)


def test_who_holds_a_run(run: RunDirectory, child: subprocess.Popen[bytes]) -> None:
    onlooker = Onlooker(run, QUICK)
    assert onlooker.who_holds() is None
    mine = held(run, this_process())
    commit(run, run.start_attempt(None, None, (), term=mine.term, claim=mine.id).attempt, 5)
    found = onlooker.who_holds()
    assert found is not None and found.alive and found.claim.id == mine.id
    mine.release()
    assert onlooker.who_holds() is None, "let go, and kept for its term"
    other = held(run, process(child.pid))
    found = onlooker.who_holds()
    assert found is not None and found.claim.id == other.id
    child.kill()
    child.wait()
    assert onlooker.who_holds() is None, "its process is gone"


def test_one_elsewhere_is_known_by_its_heartbeat(run: RunDirectory) -> None:
    lease = held(run, ELSEWHERE)
    found = Onlooker(run, QUICK).who_holds()
    assert found is not None and not found.alive, "it stands still, for longer than a heartbeat takes"
    lease.keep(QUICK.heartbeat_s)
    found = Onlooker(run, QUICK).who_holds()
    assert found is not None and found.alive
    lease.release()


def test_the_hold_of_one_that_was_superseded_is_none(run: RunDirectory) -> None:
    commit(run, run.start_attempt(None, None, ()).attempt, 5)
    held(run, this_process())  # and does not notice
    later = take(run, silent, take_over=True, timing=QUICK)
    (claim,) = (run.storage.local_path / "claims").glob("*.json")  # type: ignore[operator]
    assert later.id == claim.stem
    later.release()
    assert Onlooker(run, QUICK).who_holds() is None


def test_a_request_is_heeded_once_with_its_reason(run: RunDirectory) -> None:
    asked: list[str] = []
    with holding(run, silent, timing=QUICK) as lease:
        lease.when_asked_to_stop(asked.append)
        ask(run)
        until(lambda: bool(asked))
        time.sleep(5 * QUICK.heartbeat_s)
    assert asked == ["asked to stop by a test"]


def test_a_request_that_could_not_be_heeded_is_heeded_again(run: RunDirectory) -> None:
    asked: list[str] = []

    def act(reason: str) -> None:
        asked.append(reason)
        if len(asked) < 3:
            raise OSError(errno.EIO, "the storage is away")

    with holding(run, silent, timing=QUICK) as lease:
        lease.when_asked_to_stop(act)
        ask(run)
        until(lambda: len(asked) == 3)
        time.sleep(5 * QUICK.heartbeat_s)
    assert len(asked) == 3, "once it was"


def test_a_later_submission_is_not_asked(run: RunDirectory) -> None:
    commit(run, run.start_attempt(None, None, ()).attempt, 5)
    asked: list[str] = []
    with holding(run, silent, timing=QUICK) as first:
        first.when_asked_to_stop(asked.append)
        ask(run)
        until(lambda: bool(asked))
    with holding(run, silent, timing=QUICK) as second:
        second.when_asked_to_stop(asked.append)
        time.sleep(5 * QUICK.heartbeat_s)
        there = run.storage.list("claims")
    assert len(asked) == 1
    assert there == [f"{second.id}.json"], "the request went with the claim that it was for"


def test_before_there_is_anything_to_save_it_is_a_sigterm(run: RunDirectory) -> None:
    """Which ends `prepare` in order, with 143."""
    with pytest.raises(SystemExit) as ended, holding(run, silent, timing=QUICK):
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "else this would end the tests"
        ask(run)
        time.sleep(10)
    assert ended.value.code == 143
    assert Onlooker(run, QUICK).who_holds() is None


def test_waiting_for_the_end(run: RunDirectory, child: subprocess.Popen[bytes]) -> None:
    onlooker = Onlooker(run, QUICK)
    commit(run, run.start_attempt(None, None, ()).attempt, 5)
    lease = held(run, this_process())
    claim = onlooker.who_holds().claim  # type: ignore[union-attr]
    assert onlooker.wait_for_end(claim, 0.1) is None
    threading.Timer(0.2, lease.release).start()
    assert onlooker.wait_for_end(claim, 10) == Life.ALIVE
    held(run, process(child.pid))
    claim = onlooker.who_holds().claim  # type: ignore[union-attr]
    threading.Timer(0.2, child.kill).start()
    assert onlooker.wait_for_end(claim, 10) == Life.DEAD


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass
class Workers:
    """Stands in for a launcher: an attempt lasts until it is asked to stop, or fails at once."""

    run_directory: RunDirectory
    has_room: bool = True
    fails: bool = False
    meanwhile: Callable[[Any], object] = lambda notify: None
    """what happens while an attempt runs"""
    stopped: list[str] = field(default_factory=list)
    attempts: int = 0

    def wait_for_room(self, cancelled: Callable[[], bool], say: Any) -> int:
        if not self.has_room:
            until(cancelled)
        return int(self.has_room)

    def run(self, spec: Any, num_workers: int, notify: Any) -> str:
        self.attempts += 1
        if self.fails:
            return "rank 0 exited with 1"
        self.meanwhile(notify)
        until(lambda: self.run_directory.stop_request(spec))
        self.stopped.append(json.loads(self.run_directory.attempt(spec).read("stop.json"))["reason"])
        commit(self.run_directory, spec, 7)
        write_json(self.run_directory.attempt(spec), "end.json", {"outcome": "stopped"})
        return ""


def attempted(run: RunDirectory, launcher: Workers, lease: Lease, say: Callable[[str], None] = silent) -> Submission:
    return run_attempts(
        run,
        launcher,  # type: ignore[arg-type]
        lambda attempt, resume_from: attempt,  # type: ignore[arg-type, return-value]
        lease=lease,
        max_failures_without_progress=100,
        say=say,
    )


@pytest.mark.parametrize(
    ("workers", "step"),
    [({}, 7), ({"has_room": False}, 0), ({"fails": True}, 0)],
    ids=["while it trains", "while it waits for room", "between attempts"],
)
def test_the_drivers_loop_stops(run: RunDirectory, workers: dict[str, bool], step: int) -> None:
    launcher = Workers(run, **workers)
    with holding(run, silent, timing=QUICK) as lease:
        if launcher.fails:  # it fails at once, then at once again, then waits for a second, and for three
            threading.Thread(target=lambda: (until(lambda: launcher.attempts == 2), ask(run)), daemon=True).start()
        else:
            threading.Timer(0.2, ask, [run]).start()
        submission = attempted(run, launcher, lease)
    assert submission.decision.action == Action.STOP_RESUMABLE
    assert submission.decision.reason == f"stopped on request; step {step} is saved"
    newest = newest_usable(run, silent)
    assert (newest.step if newest else 0) == step
    assert launcher.stopped == (["asked to stop by a test"] if step else [])


def test_a_stop_that_comes_with_the_room_begins_no_attempt(run: RunDirectory) -> None:
    class Late(Workers):
        def wait_for_room(self, cancelled: Callable[[], bool], say: Any) -> int:
            until(cancelled)
            return 1

    launcher = Late(run)
    with holding(run, silent, timing=QUICK) as lease:
        threading.Timer(0.1, ask, [run]).start()
        submission = attempted(run, launcher, lease)
    assert submission.decision.action == Action.STOP_RESUMABLE
    assert submission.decision.reason == "stopped on request; step 0 is saved"
    assert launcher.attempts == submission.attempts == 0 and run.lineage() == []


def test_a_run_that_is_lost_between_attempts_is_not_stopped_but_lost(run: RunDirectory) -> None:
    launcher = Workers(run, fails=True)

    def take_it() -> None:
        until(lambda: launcher.attempts == 2)
        take(run, silent, take_over=True, timing=QUICK).release()

    with holding(run, silent, timing=QUICK) as lease:
        threading.Thread(target=take_it, daemon=True).start()
        with pytest.raises(RunHeld):
            attempted(run, launcher, lease)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often writing a wish fails yet, in its one element."""
    left, write = [3], RunDirectory.request_stop

    def fail_or_write(run: RunDirectory, *arguments: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        write(run, *arguments)

    monkeypatch.setattr(RunDirectory, "request_stop", fail_or_write)
    monkeypatch.setattr(attempts, "_AGAIN_S", 0.05)
    return left


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("signal", "the driver was asked to stop"),
        ("request", "asked to stop by a test"),
        ("notice", "the machine goes away"),
    ],
)
def test_a_wish_that_can_not_be_written_is_written_again(
    run: RunDirectory, failing: list[int], way: str, reason: str
) -> None:
    ways: dict[str, Callable[[Any], object]] = {
        "signal": lambda notify: os.kill(os.getpid(), signal.SIGTERM),
        "request": lambda notify: ask(run),
        "notice": lambda notify: notify(StopRequest(reason)),
    }
    launcher = Workers(run, meanwhile=ways[way])
    with holding(run, silent, timing=QUICK) as lease:
        submission = attempted(run, launcher, lease)
    assert failing == [0]
    assert submission.decision.action == Action.STOP_RESUMABLE and launcher.stopped == [reason]


def test_of_two_wishes_the_later_one_stands(run: RunDirectory, failing: list[int]) -> None:
    failing[0] = 1000

    def both(notify: Any) -> None:
        notify(StopRequest("the machine goes away", StopKind.PREEMPTED, deadline=17.5))
        notify(StopRequest("the driver's machine goes away", StopKind.STOP))
        failing[0] = 0

    launcher = Workers(run, meanwhile=both)
    with holding(run, silent, timing=QUICK) as lease:
        attempted(run, launcher, lease)
    time.sleep(0.2)
    (start,) = run.lineage()
    assert run.stop_request(start.attempt) == StopRequest("the driver's machine goes away", StopKind.STOP)


def test_a_wish_is_written_for_as_long_as_the_attempts_last(run: RunDirectory, failing: list[int]) -> None:
    failing[0] = 1_000_000

    class Finishing(Workers):
        def run(self, spec: Any, num_workers: int, notify: Any) -> str:
            notify(StopRequest("the machine goes away"))
            until(lambda: failing[0] < 1_000_000)
            assert writers()
            write_json(self.run_directory.attempt(spec), "end.json", {"outcome": "finished"})
            return ""

    def writers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "wish"]

    with holding(run, silent, timing=QUICK) as lease:
        assert attempted(run, Finishing(run), lease).decision.action == Action.FINISH
        until(lambda: not writers())


def test_the_handler_of_a_signal_prints_nothing(run: RunDirectory) -> None:
    """It may have interrupted a print that waits for a full pipe."""

    def say(line: str) -> None:
        if line.startswith("SIGTERM") and threading.current_thread() is threading.main_thread():
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")
        said.append(line)

    said: list[str] = []
    launcher = Workers(run, meanwhile=lambda notify: os.kill(os.getpid(), signal.SIGTERM))
    with holding(run, silent, timing=QUICK) as lease:
        attempted(run, launcher, lease, say)
    assert launcher.stopped and "SIGTERM: asking the workers to save and stop" in said


def test_an_end_that_is_cut_off_is_none(run: RunDirectory) -> None:
    """Its writer's machine went meanwhile; an object store shows what had come by then."""

    class CutOff(Workers):
        def run(self, spec: Any, num_workers: int, notify: Any) -> str:
            self.attempts += 1
            whole = json.dumps({"outcome": "finished"}).encode()
            self.run_directory.attempt(spec).write("end.json", [whole[:7] if self.attempts == 1 else whole])
            return ""

    launcher = CutOff(run)
    with holding(run, silent, timing=QUICK) as lease:
        assert attempted(run, launcher, lease).decision.action == Action.FINISH
    assert launcher.attempts == 2


def stand_in_for_carrying_on(monkeypatch: pytest.MonkeyPatch, train: Any, export: Any) -> None:
    @contextmanager
    def launching(config: Any) -> Iterator[Any]:
        yield SimpleNamespace(check_capacity=lambda say: None)

    for name, stand_in in (
        ("launching", launching),
        ("open_run", lambda config: SimpleNamespace(lineage=list)),
        ("make_job", lambda config, say: None),
        ("describe", lambda job: None),
        ("train", train),
        ("export_if_asked", export),
    ):
        monkeypatch.setattr(finetune, name, stand_in)


@pytest.mark.parametrize("when", ["in the last step", "while it exports"])
def test_an_export_is_ended_too(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Behind the last attempt nobody is there any more who would ask workers to stop."""

    def train(job: Any, launcher: Any, lease: Lease) -> Action:
        asked: list[str] = []
        lease.when_asked_to_stop(asked.append)
        if when == "in the last step":
            ask(run)
            until(lambda: bool(asked))
        return Action.FINISH

    def export(job: Any, lease: Lease) -> None:
        if when == "while it exports":
            ask(run)
        time.sleep(10)

    stand_in_for_carrying_on(monkeypatch, train, export)
    with pytest.raises(SystemExit) as ended, holding(run, silent, timing=QUICK) as lease:
        finetune.carry_on(SimpleNamespace(cluster=None), lease)  # type: ignore[arg-type]
    assert ended.value.code == 143


def test_a_run_that_has_stopped_is_not_ended_once_more(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(job: Any, launcher: Any, lease: Lease) -> Action:
        asked: list[str] = []
        lease.when_asked_to_stop(asked.append)
        ask(run)
        until(lambda: bool(asked))
        return Action.STOP_RESUMABLE

    stand_in_for_carrying_on(monkeypatch, train, None)
    with holding(run, silent, timing=QUICK) as lease:
        code = finetune.carry_on(SimpleNamespace(cluster=None), lease)  # type: ignore[arg-type]
        time.sleep(5 * QUICK.heartbeat_s)
    assert code == 75


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.EIO, "Input/output error"), "failed"),
        (OSError(errno.ENOSPC, "No space left on device"), "stopped"),
        (CorruptFile("start.json: not valid JSON"), "failed"),
        (RuntimeError("of Ray's own"), "failed"),
        (RunHeld("taken over"), None),
    ],
)
@pytest.mark.parametrize("taken_over", [False, True])
def test_a_launcher_that_fails_leaves_a_result(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str | None, taken_over: bool
) -> None:
    job = SimpleNamespace(
        run=run,
        sampler=SimpleNamespace(num_steps=9),
        spec=lambda attempt, resume_from: attempt,
        config=SimpleNamespace(
            run=SimpleNamespace(name="mine"),
            metrics=None,
            cluster=SimpleNamespace(max_failures_without_progress=3, stop_grace_s=None),
        ),
    )
    launcher: Any = SimpleNamespace(check_reach=lambda spec, say: None, open_monitor=lambda *_: NoMonitor())

    def fail(*_: Any, lease: Lease, **__: Any) -> None:
        commit(run, run.start_attempt(None, None, (), term=lease.term, claim=lease.id).attempt, 5)
        if taken_over:
            take(run, silent, take_over=True, timing=QUICK).release()
        raise error

    standing = SimpleNamespace(why_finished="", newest=None, allowed_changes=())
    monkeypatch.setattr(finetune, "settle", lambda job, say: standing)
    monkeypatch.setattr(finetune, "check_fits", lambda job, standing: None)
    monkeypatch.setattr(finetune, "run_attempts", fail)
    with holding(run, silent, timing=QUICK) as lease, pytest.raises(type(error)):
        finetune.train(job, launcher, lease)  # type: ignore[arg-type]
    result = read_json(run.storage, "result.json")
    if status is None or taken_over:
        assert result is None, "that is for who has the run now"
    else:
        assert result["status"] == status and result["step"] == 5 and result["attempts"] == 1
        assert result["reason"] == f"{type(error).__name__}: {error}" and result["claim"] == lease.id


def test_the_command_refuses_where_nobody_holds_the_run(run: RunDirectory, tmp_path: Path) -> None:
    write_json(run.storage, "run.json", {})
    for arguments in ([str(tmp_path)], [tmp_path.name, "--storage", str(tmp_path.parent)]):
        done = run_here(stop.main, *arguments)
        assert done.code == 2 and "nothing to stop, nobody holds the run" in done.output
    done = run_here(stop.main, str(tmp_path / "none"))
    assert done.code == 2 and "no run there" in done.output
    assert run_here(stop.main).code == 2


@pytest.mark.parametrize(
    ("result", "code", "said"),
    [
        ({"status": "stopped", "step": 7, "reason": "stopped on request; step 7 is saved"}, 0, "stopped at step 7: st"),
        ({"status": "finished", "step": 9, "reason": "all steps are done"}, 0, "finished at step 9: all steps"),
        ({"status": "failed", "step": 3, "reason": "NonFiniteStep"}, 1, "failed at step 3: NonFiniteStep"),
        (None, 0, "stopped; nothing had to be saved"),
    ],
)
def test_the_command_tells_how_it_ended(
    run: RunDirectory, tmp_path: Path, result: dict[str, Any] | None, code: int, said: str
) -> None:
    commit(run, run.start_attempt(None, None, ()).attempt, 5)
    lease = held(run, this_process())

    def end(reason: str) -> None:
        assert f"pid {this_process().pid}" in reason and reason.endswith("(baton stop)")
        if result is not None:
            write_json(run.storage, "result.json", result)
        lease.release()

    lease.when_asked_to_stop(end)
    lease.keep(QUICK.heartbeat_s)
    done = run_here(stop.main, str(tmp_path))
    assert done.code == code and said in done.output, done.output


@pytest.mark.parametrize(
    ("told_of", "code", "said"),
    [(1, 1, "its launcher left no result"), (2, 0, "stopped; nothing had to be saved")],
    ids=["of its attempt nothing is told", "it was past that, and exported"],
)
def test_no_result_is_no_success(run: RunDirectory, tmp_path: Path, told_of: int, code: int, said: str) -> None:
    earlier = run.start_attempt(None, None, ())
    commit(run, earlier.attempt, 5)
    lease = held(run, this_process())
    run.start_attempt(earlier, newest_usable(run, silent), (), term=lease.term, claim=lease.id)
    write_json(run.storage, "result.json", {"status": "finished", "step": 5, "reason": "", "attempts": told_of})
    lease.when_asked_to_stop(lambda reason: lease.release())
    lease.keep(QUICK.heartbeat_s)
    done = run_here(stop.main, str(tmp_path))
    assert done.code == code and said in done.output, done.output


def test_a_run_that_was_taken_over_was_not_stopped(run: RunDirectory, tmp_path: Path) -> None:
    lease = held(run, this_process())
    commit(run, run.start_attempt(None, None, (), term=lease.term, claim=lease.id).attempt, 5)

    def lose(reason: str) -> None:
        take(run, silent, take_over=True, timing=QUICK)

    lease.when_asked_to_stop(lose)
    lease.keep(QUICK.heartbeat_s)
    done = run_here(stop.main, str(tmp_path))
    assert done.code == 1 and "or lost the run to another one" in done.output, done.output


def test_the_command_need_not_wait_and_tells_of_a_death(
    run: RunDirectory, tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    lease = held(run, process(child.pid))
    assert run_here(stop.main, str(tmp_path), "--no-wait").code == 0
    assert run.storage.exists(f"claims/{lease.id}.stop")
    threading.Timer(0.3, child.kill).start()
    done = run_here(stop.main, str(tmp_path))
    assert done.code == 1 and "its launcher died before it could stop" in done.output
    assert State.HELD.value in (tmp_path / "claims" / f"{lease.id}.json").read_text()
