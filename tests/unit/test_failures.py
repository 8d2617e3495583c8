"""The policy: what follows an attempt, as a pure function of how the attempts ended."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given, strategies

from cluster.failures import Action, AttemptEnd, EndKind, decide, decide_without_room, misread, root_cause
from cluster.ray_nodes import bundles_that_fit
from data_shards.errors import BadInput, DatasetCorrupt
from trainer.errors import (
    CheckpointCorrupt,
    CheckpointOutOfReach,
    DiskFull,
    NonFiniteAgain,
    NonFiniteStep,
    OutOfMemory,
    SaveFailed,
    StepInvariantBroken,
)
from trainer.hang import Hang
from trainer.model import ModelError
from trainer.out_of_memory import OutOfMemoryLate
from trainer.run_directory import WorkerError


def failed(start: int, committed: int, error: BaseException | None = None) -> AttemptEnd:
    report = WorkerError.of(0, error) if error else None
    return AttemptEnd(EndKind.FAILED, start, committed, report, "rank 1 was ended by SIGKILL")


def action(*ends: AttemptEnd, limit: int = 2, stop: bool = False) -> Action:
    return decide(ends, limit, stop_wanted=stop).action


def test_ends() -> None:
    assert action(AttemptEnd(EndKind.FINISHED, 0, 9)) == Action.FINISH
    assert action(AttemptEnd(EndKind.STOPPED, 0, 9), stop=True) == Action.STOP_RESUMABLE
    assert action(failed(0, 0), stop=True) == Action.STOP_RESUMABLE


def test_a_lost_worker_is_retried_until_nothing_moves() -> None:
    assert action(failed(0, 0)) == Action.RETRY
    assert action(failed(0, 0), failed(0, 0)) == Action.RETRY
    assert action(failed(0, 0), failed(0, 0), failed(0, 0)) == Action.FAIL
    assert action(failed(0, 0), failed(0, 0), failed(0, 5)) == Action.RETRY, "progress starts the count anew"
    assert action(*[failed(i, i + 1) for i in range(50)]) == Action.RETRY
    assert action(failed(0, 5), failed(5, 5), failed(5, 5), failed(5, 5)) == Action.FAIL
    assert "cluster.max_failures_without_progress" in decide([failed(0, 0)] * 3, 2, stop_wanted=False).reason


def test_what_is_lost_again_and_again_is_no_progress() -> None:
    """Of the fast tier: an attempt commits, its node goes, the next one finds that out, and so on for ever."""
    lost = [failed(500, 550), failed(550, 500, CheckpointOutOfReach("550", "its node is gone"))]
    assert action(*lost) == Action.RETRY and action(*lost, *lost) == Action.RETRY
    assert action(*lost, *lost, *lost, *lost) == Action.FAIL
    unusable = [failed(step, 0, CheckpointCorrupt(str(step), "a bit")) for step in (9, 8, 7, 6, 5)]
    assert action(*unusable) == Action.RETRY, "there are only so many of them"


def test_what_no_retry_can_help_is_not_retried() -> None:
    assert action(failed(0, 5, NonFiniteStep("nan"))) == Action.FAIL
    assert action(failed(0, 0, ModelError("gated"))) == Action.BAD_INPUT
    assert action(failed(5, 5, CheckpointCorrupt("c", "bit"))) == Action.RETRY
    lost = failed(0, 0, RuntimeError("gloo: connection closed by peer"))
    assert action(lost) == Action.RETRY
    reason = decide([lost], 2, stop_wanted=False).reason
    assert "connection closed" in reason and "rank 1 was ended by SIGKILL" in reason
    assert action(failed(0, 5, NonFiniteStep("nan")), stop=True) == Action.FAIL, "a stop does not hide a fatal error"


def test_a_machine_that_came_later_does_not_make_the_input_bad() -> None:
    trained = failed(0, 5)
    assert action(trained, failed(5, 5, BadInput("not shared"))) == Action.RETRY
    assert action(trained, *[failed(5, 5, ModelError("no such directory"))] * 3) == Action.FAIL, "not without end"
    in_its_midst = at(7, BadInput("a row"), start=5, committed=5)
    assert action(trained, in_its_midst) == Action.BAD_INPUT
    assert action(failed(5, 5), failed(5, 5, BadInput("not shared"))) == Action.BAD_INPUT, "it may never have been good"


def test_memory_that_was_enough_before_is_asked_for_once_more() -> None:
    """A neighbour may hold it, or a process that can't be ended; fewer workers may each need more than there is."""
    trained, short = failed(0, 5), at(6, OutOfMemory("no room for 2 GiB"), start=5, committed=5)
    assert action(short) == Action.FAIL, "it may never have been enough"
    assert action(trained, short) == Action.RETRY
    again = decide([trained, short, short], 9, stop_wanted=False)
    assert again.action == Action.FAIL and "no room for 2 GiB" in again.reason


def test_workers_that_stop_for_a_notice_that_they_could_not_pass_on() -> None:
    """Nobody has asked the run to stop; and it goes round only so often where nothing is done in between."""
    stopped = AttemptEnd(EndKind.STOPPED, 0, 9)
    assert action(stopped) == Action.RETRY
    idle = [AttemptEnd(EndKind.STOPPED, 9, 9)] * 3
    assert action(stopped, *idle[:2]) == Action.RETRY and action(stopped, *idle) == Action.FAIL


def test_a_full_disk_stops_resumably() -> None:
    """Whether or not something was committed before, and at once: no attempt can make room."""
    full = failed(5, 5, DiskFull("the disk of /runs is full"))
    for before in ([], [failed(0, 5)], [failed(5, 5)] * 2):
        decision = decide([*before, full], 2, stop_wanted=False)
        assert decision.action == Action.STOP_RESUMABLE and "the disk of /runs is full" in decision.reason
    assert "full" in decide([full], 2, stop_wanted=True).reason, "a stop does not hide it"
    assert action(failed(5, 5, SaveFailed("3 saves in a row failed"))) == Action.RETRY, "other saves are tried again"


def test_no_room_is_no_failure() -> None:
    late = decide_without_room(7, stop_wanted=False)
    assert late.action == Action.STOP_RESUMABLE and "wait_for_room_s" in late.reason and "step 7" in late.reason
    stopped = decide_without_room(7, stop_wanted=True)
    assert stopped.action == Action.STOP_RESUMABLE and "on request" in stopped.reason


def test_waits_grow_only_without_progress() -> None:
    delays = [decide([failed(0, 0)] * n, 99, stop_wanted=False).delay_s for n in (1, 2, 3, 10)]
    assert delays == [0.0, 1.0, 3.0, 60.0]


def test_root_cause_is_the_error_raised_on_purpose() -> None:
    collateral = WorkerError.of(0, RuntimeError("connection reset"))
    cause = WorkerError.of(3, NonFiniteStep("nan"))
    assert root_cause([collateral, cause]) == cause
    elsewhere, corrupt = (
        WorkerError.of(0, CheckpointOutOfReach("5", "a copy")),
        WorkerError.of(3, CheckpointCorrupt("5", "bit")),
    )
    assert root_cause([elsewhere, corrupt]) == corrupt
    assert root_cause([]) is None


def test_root_cause_is_a_full_disk_rather_than_what_it_caused_elsewhere() -> None:
    full = WorkerError.of(3, DiskFull("full"))
    collateral = [WorkerError.of(rank, RuntimeError("gloo: connection closed by peer")) for rank in range(3)]
    corrupt = WorkerError.of(1, CheckpointCorrupt("c", "bit"))
    assert root_cause([*collateral, full]) == root_cause([full, *collateral]) == root_cause([corrupt, full]) == full
    fatal = WorkerError.of(4, NonFiniteStep("nan"))
    assert root_cause([*collateral, full, fatal]) == fatal, "with room it would not go on either"


def test_root_cause_is_the_hang_that_names_ranks_or_what_those_left() -> None:
    collateral = WorkerError.of(0, RuntimeError("gloo: connection closed by peer"))
    unsure, sure = WorkerError.of(1, Hang("?")), WorkerError.of(3, Hang("rank 2"), step=8, suspects=(2,))
    assert root_cause([collateral, unsure, sure]) == root_cause([sure, unsure, collateral]) == sure
    assert root_cause([collateral, unsure]) == unsure
    theirs = WorkerError.of(2, OSError("the disk is gone"))
    assert root_cause([collateral, unsure, sure, theirs]) == theirs
    assert action(AttemptEnd(EndKind.FAILED, 5, 5, sure)) == Action.RETRY
    late = WorkerError.of(3, OutOfMemoryLate("rank 3 ran out of memory"), step=8)
    assert root_cause([collateral, late]) == late


def test_an_exception_comes_before_what_collectives_say_of_its_rank() -> None:
    closed = "[pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:46283"
    others = [RuntimeError(closed), RuntimeError("NCCL error: remote process exited or there was a network error")]
    errors = [WorkerError.of(rank, error) for rank, error in enumerate([*others, KeyError("labels")])]
    cause = root_cause(errors)
    assert cause is not None and cause.rank == 2 and cause.type == "KeyError"


def test_a_bad_read_of_good_data_is_the_attempts_failure() -> None:
    found = WorkerError.of(1, DatasetCorrupt("/data", "train-00000.arrow", "block 0"), step=8)
    assert found.data_file == "train-00000.arrow" and "delete /data" in found.message
    assert decide([AttemptEnd(EndKind.FAILED, 5, 5, found)], 2, stop_wanted=False).action == Action.FAIL
    end = AttemptEnd(EndKind.FAILED, 5, 5, misread(found, "the driver reads it well", "rank 1's node gpu-7"))
    once = decide([end], 2, stop_wanted=False)
    assert once.action == Action.RETRY and once.reason.endswith("the driver reads it well; look at rank 1's node gpu-7")
    assert action(end, end, end) == Action.FAIL and action(end, stop=True) == Action.STOP_RESUMABLE


def test_what_may_be_a_bad_read_does_not_hide_what_is_fatal() -> None:
    read = WorkerError.of(0, DatasetCorrupt("/data", "train-00000.arrow", "block 0"))
    fatal, collateral = WorkerError.of(3, NonFiniteStep("nan")), WorkerError.of(1, RuntimeError("connection reset"))
    assert root_cause([read, fatal, collateral]) == fatal and root_cause([collateral, read]) == read


def test_errors_pickle_across_processes() -> None:
    error = pickle.loads(pickle.dumps(CheckpointCorrupt("00000005-a", "block 1")))
    assert (error.checkpoint, error.problem, str(error)) == ("00000005-a", "block 1", "checkpoint 00000005-a: block 1")


def test_a_worker_lies_on_one_node() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 8.0}]
    assert bundles_that_fit(nodes, {"CPU": 2.0, "GPU": 0.0}) == 5
    assert bundles_that_fit(nodes, {"CPU": 2.0, "GPU": 1.0}) == 1
    assert bundles_that_fit([], {"CPU": 1.0}) == 0


def at(step: int | None, error: BaseException, start: int = 0, committed: int = 0) -> AttemptEnd:
    return AttemptEnd(EndKind.FAILED, start, committed, WorkerError.of(0, error, step=step))


def test_the_same_error_at_the_same_step_is_a_crash_loop() -> None:
    def broken(port: int) -> AttemptEnd:
        return at(8, RuntimeError(f"connection closed by [127.0.0.1]:{port}"), 6, 6)

    first = at(8, RuntimeError("connection closed by [127.0.0.1]:1"), 0, 6)
    assert action(first, broken(2), limit=9) == Action.RETRY
    ended = decide([first, broken(2), broken(3)], 9, stop_wanted=False)
    assert ended.action == Action.FAIL and "a crash loop: step 8 failed 3 times in a row" in ended.reason
    assert "connection closed" in ended.reason
    assert action(first, broken(2), at(8, OSError("other"), 6, 6), limit=9) == Action.RETRY
    assert action(first, broken(2), at(9, RuntimeError("connection closed by [127.0.0.1]:4"), 6, 6), limit=9) == (
        Action.RETRY
    )
    again = at(8, RuntimeError("connection closed by [127.0.0.1]:1"), 6, 7)
    assert action(first, broken(2), again, limit=9) == Action.RETRY, "something was committed in between"
    starting = [at(None, RuntimeError("no route to host"))] * 4
    assert action(*starting, limit=9) == Action.RETRY, "before the first step only the number counts"


def test_what_recurs_is_tried_once_more() -> None:
    assert action(at(8, NonFiniteAgain("nan"), 0, 6)) == Action.RETRY
    twice = decide([at(8, NonFiniteAgain("nan"), 0, 6), at(8, NonFiniteAgain("nan"), 6, 7)], 9, stop_wanted=False)
    assert twice.action == Action.FAIL and "a crash loop: step 8" in twice.reason
    assert action(at(8, NonFiniteAgain("nan"), 0, 6), at(9, NonFiniteAgain("nan"), 6, 6)) == Action.RETRY


FATAL = (
    NonFiniteStep("nan"),
    ModelError("gated"),
    DiskFull("full"),
    StepInvariantBroken("rows"),
    DatasetCorrupt("/data", "train-00000.arrow", "block 0"),
)
PASSING = (
    None,
    RuntimeError("connection closed by peer [10.0.0.1]:5"),
    OSError("eio"),
    Hang("rank 1"),
    SaveFailed("x"),
)
STEPS = strategies.integers(1, 40) | strategies.none()


def ends(errors: Sequence[BaseException | None]) -> strategies.SearchStrategy[list[tuple[Any, int | None, int]]]:
    """(error, its step, steps that are committed on top) of attempts."""
    return strategies.lists(
        strategies.tuples(strategies.sampled_from(errors), STEPS, strategies.integers(0, 5)), min_size=1, max_size=40
    )


def history(of: Sequence[tuple[Any, int | None, int]], *, gain: Callable[[int], int]) -> list[AttemptEnd]:
    found, committed = [], 0
    for error, step, more in of:
        report = WorkerError.of(0, error, step=step) if error is not None else None
        found.append(AttemptEnd(EndKind.FAILED, committed, committed + gain(more), report, "rank 1 was lost"))
        committed += gain(more)
    return found


@given(ends((*PASSING, NonFiniteAgain("nan"))), strategies.integers(0, 6))
def test_without_progress_it_ends(of: list[tuple[Any, int | None, int]], limit: int) -> None:
    whole = history(of, gain=lambda more: 0)
    actions = [decide(whole[:n], limit, stop_wanted=False).action for n in range(1, len(whole) + 1)]
    assert all(found == Action.FAIL for found in actions[limit:])


@given(ends(PASSING), strategies.integers(0, 6))
def test_with_progress_it_never_ends(of: list[tuple[Any, int | None, int]], limit: int) -> None:
    whole = history(of, gain=lambda more: more + 1)
    assert all(decide(whole[:n], limit, stop_wanted=False).action == Action.RETRY for n in range(1, len(whole) + 1))


@given(ends(PASSING), strategies.sampled_from(FATAL), STEPS, strategies.integers(0, 6), strategies.booleans())
def test_what_is_fatal_is_never_retried(
    of: list[tuple[Any, int | None, int]], fatal: BaseException, step: int | None, limit: int, stop: bool
) -> None:
    whole = [
        *history(of, gain=lambda more: more),
        AttemptEnd(EndKind.FAILED, 0, 99, WorkerError.of(0, fatal, step=step)),
    ]
    assert decide(whole, limit, stop_wanted=stop).action not in (Action.RETRY, Action.FINISH)
