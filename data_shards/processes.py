"""Work spread over processes of this machine, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from data_shards.errors import BatonError

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 3
"""Items under way or done and waiting, per process: bounds memory, and keeps all busy while one result is used"""


class WorkerLost(BatonError):
    """A process ended in the middle of its work: what was committed stands, and the same command goes on from there."""

    retryable = True


def end_with_parent() -> None:
    """Called in a process that ``multiprocessing`` started: it is killed when the one that started it is gone."""
    threading.Thread(target=_outlive_nobody, daemon=True).start()


def _outlive_nobody() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


_work: Callable[[Any], Any] | None = None


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    _work = work


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """``work(item)`` for each item, in their order, by ``processes`` processes; by this one alone where that is 1.

    Args:
        work: picklable; sent to each process once.

    Raises what ``work`` raises, at its item's place; WorkerLost where a process was ended from outside.
    """
    if processes == 1:
        yield from map(work, items)
        return
    # Not forks: whoever calls this may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(work,)) as pool:
        todo = iter(items)
        ahead: deque[Future[Result]] = deque(pool.submit(_do, item) for item in islice(todo, _AHEAD * processes))
        try:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(_do, item) for item in islice(todo, 1))
                yield result
        except BrokenProcessPool as error:
            raise WorkerLost(
                "a process that prepares data was ended from outside, mostly for want of memory; give it more, or set "
                "data.processes lower. What was prepared is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
