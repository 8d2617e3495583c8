"""What a person reads while it trains, and the per-step records that stay with the attempt."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

import torch.distributed as dist

from data_shards.errors import BatonError
from data_shards.storage import Storage
from trainer.evaluate import EvaluationResult
from trainer.run_directory import utc_now
from trainer.step import StepResult

STEPS = "steps"
"""Folder of an attempt with the records of steps, a file a commit."""
SO_FAR = "steps-so-far.jsonl"
"""Beside it, the records that no commit followed yet."""
SO_FAR_EVERY_S = 15.0
_SO_FAR_AT_MOST = 2000
"""Records, the newest: a run that commits once in a hundred thousand steps need not write them all again and again."""
_NOT_RECORDED = ("standing", "applied", "nonfinite_rows")
"""the last two only where a step went wrong"""


def _for_json(value: Any) -> Any:
    """JSON has no inf and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """``1h02m``, ``3m05s`` or ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def say(text: str, file: TextIO | None = None) -> None:
    """A line with its time, in one write: others write to the same pipe, and where Python does not buffer, ``print``
    by itself lets them in before the line's end."""
    print(f"{utc_now()} {text}\n", end="", file=file, flush=True)


def say_on_first_rank(text: str) -> None:
    """Before there is a log: while the model is built."""
    if dist.get_rank() == 0:
        say(text)


class ProgressLog:
    """On rank 0 prints lines and keeps step records; silent elsewhere.

    Records go to ``attempts/<id>/steps/<first>-<last>.jsonl`` just before a checkpoint is committed: an object
    store has no append. Meanwhile those that wait for that are written aside now and then, behind training, for whoever
    looks on, and so that of an attempt that is killed it is known what was lost.
    """

    def __init__(self, attempt: Storage, num_steps: int, log_every: int, *, enabled: bool) -> None:
        self._attempt = attempt
        self._num_steps = num_steps
        self._log_every = log_every
        self._enabled = enabled
        self._records: list[dict[str, Any]] = []
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)  # seconds and tokens of recent steps
        self._aside: threading.Timer | None = None

    def say(self, text: str) -> None:
        if self._enabled:
            say(text)

    @staticmethod
    def warn(text: str) -> None:
        """From any rank."""
        say(text, sys.stderr)

    def step(self, step: int, result: StepResult, learning_rate: float, seconds: float) -> None:
        """Args: step: completed ones, this included."""
        self._recent.append((seconds, result.tokens))
        figures = {name: _for_json(value) for name, value in result._asdict().items() if name not in _NOT_RECORDED}
        if not result.applied:
            figures |= {"applied": False, "nonfinite_rows": result.nonfinite_rows}
        known = {"step": step, "num_steps": self._num_steps, "lr": learning_rate, "seconds": seconds}
        self._records.append({**known, "time": time.time(), **figures})
        self._write_aside_soon()
        if step % self._log_every == 0 or step in (1, self._num_steps):
            spent, tokens = (sum(values) for values in zip(*self._recent, strict=True))
            eta = duration(spent / len(self._recent) * (self._num_steps - step))
            self.say(
                f"step {step}/{self._num_steps}  loss {result.loss:.4f}  lr {learning_rate:.2e}  "
                f"grad norm {result.grad_norm:.3f}  {tokens / max(spent, 1e-9):,.0f} tok/s  ETA {eta}"
            )

    def _write_aside_soon(self) -> None:
        """By a timer and not by the steps, so that those before a hang are told too."""
        if not self._enabled or (self._aside and self._aside.is_alive()):
            return
        self._aside = threading.Timer(SO_FAR_EVERY_S, self._write_aside)
        self._aside.daemon = True
        self._aside.start()

    def _write_aside(self) -> None:
        records = self._records[-_SO_FAR_AT_MOST:]
        with suppress(OSError, BatonError):  # for people
            if records:
                self._attempt.write(SO_FAR, [_lines(records)])

    @property
    def tokens_per_second(self) -> float:
        """Over recent steps, all workers together."""
        spent, tokens = (sum(values) for values in zip(*self._recent, strict=True)) if self._recent else (0.0, 0)
        return tokens / max(spent, 1e-9)

    def evaluation(self, step: int, result: EvaluationResult) -> None:
        self.say(
            f"evaluation after step {step}: loss {result.loss:.4f}  perplexity {result.perplexity:.3f}  "
            f"token accuracy {result.accuracy:.1%}  over {result.trained_tokens:,} tokens"
        )

    def flushing(self) -> Callable[[], None]:
        """What writes the records until now, to be called before the commit: later, those of steps behind it would
        never be made again. May be called while steps are added; what could not be written is written next time."""
        number = len(self._records)

        def flush() -> None:
            records = self._records[:number]
            if self._enabled and records:
                first, last = records[0]["step"], records[-1]["step"]
                self._attempt.write(f"{STEPS}/{first:08d}-{last:08d}.jsonl", [_lines(records)])
            del self._records[:number]
            if self._aside:
                self._aside.cancel()

        return flush


def _lines(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
