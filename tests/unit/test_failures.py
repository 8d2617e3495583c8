"""The policy: what follows an attempt, as a pure function of how the attempts ended."""

from __future__ import annotations

import pickle

from cluster.failures import Action, AttemptEnd, EndKind, decide, decide_without_room, root_cause
from cluster.ray_train import bundles_that_fit
from trainer.errors import CheckpointCorrupt, NonFiniteStep
from trainer.model import ModelError
from trainer.run_directory import WorkerError


def failed(start: int, committed: int, error: BaseException | None = None) -> AttemptEnd:
    report = WorkerError.of(0, error) if error else None
    return AttemptEnd(EndKind.FAILED, start, committed, report, "rank 1 was ended by SIGKILL")


def action(*ends: AttemptEnd, limit: int = 2, stop: bool = False) -> Action:
    return decide(ends, limit, stop_wanted=stop).action


def test_ends() -> None:
    assert action(AttemptEnd(EndKind.FINISHED, 0, 9)) == Action.FINISH
    assert action(AttemptEnd(EndKind.STOPPED, 0, 9)) == Action.STOP_RESUMABLE
    assert action(failed(0, 0), stop=True) == Action.STOP_RESUMABLE


def test_a_lost_worker_is_retried_until_nothing_moves() -> None:
    assert action(failed(0, 0)) == Action.RETRY
    assert action(failed(0, 0), failed(0, 0)) == Action.RETRY
    assert action(failed(0, 0), failed(0, 0), failed(0, 0)) == Action.FAIL
    assert action(failed(0, 0), failed(0, 0), failed(0, 5)) == Action.RETRY, "progress starts the count anew"
    assert action(*[failed(i, i + 1) for i in range(50)]) == Action.RETRY
    assert action(failed(0, 5), failed(5, 5), failed(5, 5), failed(5, 5)) == Action.FAIL
    assert "cluster.max_failures_without_progress" in decide([failed(0, 0)] * 3, 2, stop_wanted=False).reason


def test_what_no_retry_can_help_is_not_retried() -> None:
    assert action(failed(0, 5, NonFiniteStep("nan"))) == Action.FAIL
    assert action(failed(0, 0, ModelError("gated"))) == Action.BAD_INPUT
    assert action(failed(5, 5, CheckpointCorrupt("c", "bit"))) == Action.RETRY
    lost = failed(0, 0, RuntimeError("gloo: connection closed by peer"))
    assert action(lost) == Action.RETRY
    reason = decide([lost], 2, stop_wanted=False).reason
    assert "connection closed" in reason and "rank 1 was ended by SIGKILL" in reason
    assert action(failed(0, 5, NonFiniteStep("nan")), stop=True) == Action.FAIL, "a stop does not hide a fatal error"


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
    assert root_cause([]) is None


def test_errors_pickle_across_processes() -> None:
    error = pickle.loads(pickle.dumps(CheckpointCorrupt("00000005-a", "block 1")))
    assert (error.checkpoint, error.problem, str(error)) == ("00000005-a", "block 1", "checkpoint 00000005-a: block 1")


def test_a_worker_lies_on_one_node() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 8.0}]
    assert bundles_that_fit(nodes, {"CPU": 2.0, "GPU": 0.0}) == 5
    assert bundles_that_fit(nodes, {"CPU": 2.0, "GPU": 1.0}) == 1
    assert bundles_that_fit([], {"CPU": 1.0}) == 0
