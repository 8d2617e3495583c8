"""One actor per run, beside the driver, that answers Prometheus; it outlives the workers of every attempt.

Nothing waits for it while the run goes on: workers and driver send and forget, and if it is gone they do not notice.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, Protocol

from cluster.config import MetricsConfig
from cluster.run_metrics import DurableMetrics, RunState
from data_shards.storage import Storage
from trainer.metrics import MetricsSink, NoMetrics, Report

KEEP_EVERY_S = 5.0
"""Seconds between looks after the port and the file, beside what scrapes and commits cause."""
_ANSWER_S = 0.5
"""Seconds that an answer may take to reach the scraper once it is made."""
_MAX_PENDING = 1000
"""Calls that may wait for the actor before further ones are dropped."""


class Monitor(Protocol):
    """What the driver tells about a run. No method raises, and only ``close`` may wait."""

    @property
    def sink(self) -> MetricsSink:
        """For the workers; must survive being sent to them."""
        ...

    def attempt_started(self, number: int) -> None:
        """Called before each attempt; 1 is the run's first."""
        ...

    def set_state(self, state: RunState) -> None: ...

    def close(self, state: RunState) -> None:
        """Called once, when the run has ended: show ``state`` to a scraper that has been coming, then go."""
        ...


class NoMonitor:
    """For launchers without Ray, and for ``metrics.port=0``."""

    sink: MetricsSink = NoMetrics()

    def attempt_started(self, number: int) -> None:
        return None

    def set_state(self, state: RunState) -> None:
        return None

    def close(self, state: RunState) -> None:
        return None


def wait_for_last_scrape_s(scrapes: Sequence[float], limit_s: float) -> float:
    """How long a scraper that came at these times (monotonic seconds, oldest first) may need to come again (pure)."""
    if not scrapes:
        return 0.0
    if len(scrapes) == 1:
        return limit_s
    return min(limit_s, 1.5 * max(b - a for a, b in pairwise(scrapes)) + _ANSWER_S)


class RunMonitor:
    """The actor's body: figures, their file, and the HTTP port. Works without Ray, too."""

    def __init__(self, run: str, run_uri: str, address: str, config: MetricsConfig) -> None:
        self._durable = DurableMetrics(run, Storage.at(run_uri), _say)
        self._address, self._config = address, config
        self._scrapes: deque[float] = deque(maxlen=10)
        self._scraped = threading.Condition()
        self._server: Any = None
        self._told_of_port = False
        self._closed = threading.Event()
        threading.Thread(target=self._keep, daemon=True, name="run-monitor").start()

    def report(self, report: Report) -> None:
        if self._durable.metrics.report(report):
            self._durable.save()

    def attempt_started(self, number: int) -> None:
        self._durable.metrics.attempt_started(number)
        self._durable.save()

    def set_state(self, state: RunState) -> None:
        self._durable.metrics.set_state(state)

    def close(self, state: RunState) -> None:
        """Returns once a scraper has seen how it ended, or does not seem to come."""
        self.set_state(state)
        shown = time.monotonic()
        self._durable.save()
        with self._scraped:
            wait_s = wait_for_last_scrape_s(self._scrapes, self._config.wait_for_last_scrape_s)
            came = self._scraped.wait_for(lambda: any(began > shown for began in self._scrapes), wait_s)
        if came:
            time.sleep(_ANSWER_S)  # the answer is still on its way
        self._closed.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def collect(self) -> Iterator[Any]:
        """Called by the HTTP server for each scrape."""
        began = time.monotonic()
        yield from self._durable.collect()
        with self._scraped:
            self._scrapes.append(began)
            self._scraped.notify_all()

    def _keep(self) -> None:
        while True:
            if self._server is None:
                self._listen()
            self._durable.save()
            if self._closed.wait(KEEP_EVERY_S):
                return

    def _listen(self) -> None:
        """Take the port, or say once why not: whoever holds it may go, such as the monitor of a killed driver."""
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(self)
        port = self._config.port
        try:
            self._server, _ = start_http_server(port, self._address, registry)
        except OSError as error:
            if not self._told_of_port:
                _say(
                    f"metrics: {self._address}:{port} can't be taken yet ({error}); trying on. If another run on this "
                    "node has it, choose another with metrics.port=…, or 0 for none"
                )
            self._told_of_port = True
            return
        _say(f"metrics: http://{self._address}:{port}/metrics")


def _say(text: str) -> None:
    print(text, flush=True)


class RaySink:
    """Sends reports to the actor. Used in the worker of rank 0."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def send(self, report: Report) -> None:
        from ray.exceptions import RayError

        with suppress(RayError):  # it is gone, or far behind: metrics are not worth a step
            self._actor.report.options(num_returns=0).remote(report)


class RayMonitor:
    """The driver's side of the actor."""

    def __init__(self, actor: Any, config: MetricsConfig) -> None:
        self._actor = actor
        self._config = config

    @property
    def sink(self) -> MetricsSink:
        return RaySink(self._actor)

    def attempt_started(self, number: int) -> None:
        self._tell("attempt_started", number)

    def set_state(self, state: RunState) -> None:
        self._tell("set_state", state)

    def _tell(self, method: str, argument: Any) -> None:
        from ray.exceptions import RayError

        with suppress(RayError):
            getattr(self._actor, method).options(num_returns=0).remote(argument)

    def close(self, state: RunState) -> None:
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self._actor.close.remote(state), timeout=self._config.wait_for_last_scrape_s + 10)
        except RayError as error:
            _say(f"metrics: the monitor did not end in order ({type(error).__name__}: {str(error).splitlines()[0]})")
        ray.kill(self._actor)


def start_monitor(run: str, run_uri: str, address: str, config: MetricsConfig) -> Monitor:
    """The run's actor on this process's node, without any CPU slot; brought up again by Ray should it die alone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor_class = ray.remote(RunMonitor).options(
        num_cpus=0,
        max_restarts=-1,
        max_pending_calls=_MAX_PENDING,
        scheduling_strategy=here,
    )
    return RayMonitor(actor_class.remote(run, run_uri, address, config), config)
