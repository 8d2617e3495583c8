"""What a person reads while it trains, and the per-step records that stay with the attempt."""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any

from data_shards.storage import Storage
from trainer.evaluate import EvaluationResult
from trainer.run_directory import utc_now
from trainer.step import StepResult


def duration(seconds: float) -> str:
    """``1h02m``, ``3m05s`` or ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


class ProgressLog:
    """On rank 0 prints lines and keeps step records; silent elsewhere.

    Records go to ``attempts/<id>/steps/<first>-<last>.jsonl`` just before a checkpoint is committed: an object
    store has no append, and steps after the last commit will be done again anyway.
    """

    def __init__(self, attempt: Storage, num_steps: int, log_every: int, *, enabled: bool) -> None:
        self._attempt = attempt
        self._num_steps = num_steps
        self._log_every = log_every
        self._enabled = enabled
        self._records: list[dict[str, Any]] = []
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)  # seconds and tokens of recent steps

    def say(self, text: str) -> None:
        if self._enabled:
            print(f"{utc_now()} {text}", flush=True)

    def step(self, step: int, result: StepResult, learning_rate: float, seconds: float) -> None:
        """Args: step: completed ones, this included."""
        self._recent.append((seconds, result.tokens))
        self._records.append(
            {"step": step, "lr": learning_rate, "seconds": seconds, "time": time.time(), **result._asdict()}
        )
        if step % self._log_every == 0 or step in (1, self._num_steps):
            spent, tokens = (sum(values) for values in zip(*self._recent, strict=True))
            eta = duration(spent / len(self._recent) * (self._num_steps - step))
            self.say(
                f"step {step}/{self._num_steps}  loss {result.loss:.4f}  lr {learning_rate:.2e}  "
                f"grad norm {result.grad_norm:.3f}  {tokens / max(spent, 1e-9):,.0f} tok/s  ETA {eta}"
            )

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

    def flush(self) -> None:
        if self._enabled and self._records:
            first, last = self._records[0]["step"], self._records[-1]["step"]
            lines = "".join(json.dumps(record) + "\n" for record in self._records)
            self._attempt.write(f"steps/{first:08d}-{last:08d}.jsonl", [lines.encode()])
        self._records.clear()
