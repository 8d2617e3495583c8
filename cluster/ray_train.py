"""Workers through Ray Train: on the cluster that a job runs in, or an embedded one on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import ray_nodes
from cluster.config import ClusterConfig, MetricsConfig
from cluster.launcher import NEW, Past
from cluster.lease import exit_by_signal
from cluster.notice_server import NoticeServer
from cluster.ray_room import Room
from cluster.ray_session import Session, open_board, supervise
from cluster.ray_watch import Watch
from cluster.run_monitor import Monitor, NoMonitor, start_monitor
from data_shards.errors import BadInput
from data_shards.storage import Storage
from trainer.config import WorkerSpec
from trainer.run_directory import RunDirectory, Say, StopKind, StopRequest

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
_IN_JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def in_ray_job() -> bool:
    """Whether this process is the driver of a ``ray job submit``."""
    return _IN_JOB_MARK in os.environ


def has_cluster() -> bool:
    """Whether there is one around us, so that none is started here."""
    return in_ray_job() or bool(os.environ.get("RAY_ADDRESS"))


def _here() -> str:
    """The id of the driver's node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _fulfil(future: Future[Any], action: Callable[[], Any]) -> None:
    try:
        future.set_result(action())
    except BaseException as error:
        future.set_exception(error)


def _backend() -> Any:
    """Nothing of torch: the process group is that of the supervisors' children."""
    from ray.train.backend import Backend, BackendConfig

    class Supervisors(Backend):
        share_cuda_visible_devices = True

    class Config(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Supervisors

    return Config()


def connect(slots: int) -> bool:
    """To the cluster around us, else to an embedded one of so many CPUs. Returns whether it is embedded.

    Raises BadInput where a cluster is around us, and does not answer or does not take our token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Train would else show every line that a worker prints twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # Ray Train's own way with drains: at the deadline, or two minutes after a drain without one, it kills the workers,
    # whether or not they have saved. Ours is Watch.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    with _own_sigterm():
        if has_cluster():
            _join()
            return False
        _embed(slots)
        return True


def _join() -> None:
    address = os.environ.get("RAY_ADDRESS", "auto")
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address="auto", log_to_driver=True)
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        raise BadInput(
            f"RAY_ADDRESS={address}: the Ray cluster can't be joined ({' '.join(str(error).split())[:500]}). Is it "
            "there, at the port of its control store (6379), and reached from here? If it wants a token, set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its own"
        ) from error


def _embed(slots: int) -> None:
    if "RAY_AUTH_MODE" not in os.environ:
        # Its ports are open to whoever reaches this machine, and who may speak to them may run code. Said before Ray is
        # imported, which would else write a token for every later cluster of this user.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    # Else one idle worker a CPU, of no use to training, whose workers get an environment of their own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Without a dashboard Ray Train warns each second that it can't ask it; only errors are worth a line here.
    quiet = ray.LoggingConfig(log_level="ERROR")
    level, handlers = logging.root.level, list(logging.root.handlers)
    ray.init(address="local", num_cpus=slots, include_dashboard=False, logging_config=quiet, logging_level="ERROR")
    # Ray sets that level for everybody, and our own warnings, of a storage that fails, would be lost.
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers
    logging.getLogger("ray").setLevel(logging.ERROR)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """``ray.init`` takes the signal, to exit with 15, which is in nobody's table of exit codes. Whoever took it before
    keeps it; else it unwinds the stack with the code that shells tell of it."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_main and before is not None:
            signal.signal(signal.SIGTERM, exit_by_signal if before == signal.SIG_DFL else before)


@contextmanager
def connected() -> Iterator[None]:
    """Connected to Ray meanwhile; where a launcher has done so already, nothing happens."""
    imported = sys.modules.get("ray")  # not imported here: the embedded one's token comes before
    if imported is not None and imported.is_initialized():
        yield
        return
    connect(os.cpu_count() or 1)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def room_was_taken(error: Exception, room: Room, num_workers: int) -> bool:
    """Whether the room that had been found was gone when Ray Train asked for it: then nothing has failed. Where it is
    still there, and Ray Train could not begin in it, something has."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    late = isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)
    return late and room.more(0) < num_workers


class RayTrain:
    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._monitor: Monitor = NoMonitor()
        self._session: Session | None = None
        self._is_left = False
        """whether an attempt has made way for one on other machines"""
        self._embedded = connect(max(os.cpu_count() or 1, int(config.num_workers * config.cpus_per_worker)))
        self._room = Room(config, others_may_join=not self._embedded)
        self._notices = NoticeServer(config.notice_port, self._take_notice) if config.notice_port else None

    def _take_notice(self, name: str, seconds_left: float | None) -> bool:
        node = ray_nodes.find(name)
        if node is not None:
            deadline = time.time() + seconds_left if seconds_left is not None else None
            ray_nodes.drain(node, "a notice came to Baton", deadline)
        return node is not None

    def leave(self, node: str, request: StopRequest) -> None:
        from ray.exceptions import RayError

        if node == _here():  # whose Ray would end, and with it the driver
            return
        try:
            ray_nodes.drain(node, request.reason, request.deadline)
        except (RayError, OSError, RuntimeError) as error:  # the next attempt may be placed there, and leave it again
            log.warning("Ray could not be told to place nothing on node %s: %s", node, error)

    def check_capacity(self, say: Say, past: Past = NEW) -> None:
        self._room.check_capacity(say, past)

    def check_reach(self, spec: WorkerSpec, say: Say) -> None:
        self._room.check_reach(spec, say)

    def wait_for_room(self, cancelled: Callable[[], bool], say: Say) -> int:
        if self._session is not None and self._keeps(self._session):
            return self._session.num_workers
        self._drop_session()
        return self._room.wait(cancelled, say)

    def open_monitor(self, run: str, run_uri: str, config: MetricsConfig) -> Monitor:
        if config.port:
            address = config.address or ("127.0.0.1" if self._embedded else "0.0.0.0")
            self._monitor = start_monitor(run, run_uri, address, config)
        return self._monitor

    def run(self, spec: WorkerSpec, num_workers: int, notify: Callable[[StopRequest], None]) -> str:
        """On the supervisors that there are, if they are as many and their nodes stay; else on new ones."""
        from ray.exceptions import RayError
        from ray.train.v2.api.exceptions import TrainingFailedError

        def make_way(request: StopRequest) -> None:
            self._is_left = request.kind != StopKind.STOP
            notify(request)

        run = RunDirectory.at(spec.run_uri)
        config = self._config
        watch = Watch(
            *(run, spec.attempt, num_workers, config.workers, self._room.more, make_way, _here()),
            notice_file=config.notice_file,
        )
        told = spec.model_copy(update={"notice_file": self._config.notice_file})
        try:
            session = self._session = self._session or self._start(num_workers, run.attempt(spec.attempt))
            with watch.watching():
                return session.run(told, self._monitor.sink)
        except (TrainingFailedError, RayError) as error:
            if room_was_taken(error, self._room, num_workers):
                run.request_stop(spec.attempt, "others took the room for its workers", StopKind.RESIZE)
            return f"Ray Train reports: {str(error).strip().splitlines()[-1][:300]}"

    def _start(self, num_workers: int, place: Storage) -> Session:
        """One ``fit()`` without Ray's own retries: what to do after a failure is decided in ``cluster.failures``."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        board = open_board()
        trainer = DataParallelTrainer(
            supervise,
            train_loop_config={"board": board},
            backend_config=_backend(),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=self._room.use_gpu,
                resources_per_worker=self._room.bundle,
                label_selector=self._room.label_selector(),
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=place.uri,
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
                worker_runtime_env={} if self._room.use_gpu else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
            ),
        )
        # Not on the main thread: there it would replace our signal handlers, and Ctrl-C would save nothing.
        fit: Future[Any] = Future()
        threading.Thread(target=_fulfil, args=(fit, trainer.fit), name="ray-train", daemon=True).start()
        return Session(board, num_workers, fit)

    def _drop_session(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session, self._is_left = None, False

    def _keeps(self, session: Session) -> bool:
        """Whether its supervisors can run the next attempt, too: all there, as many as may be, on nodes that stay."""
        if not session.is_alive or self._is_left:
            return False
        with suppress(Exception):  # of Ray's own: then it is gone
            return self._room.more(session.num_workers) == 0 and session.nodes() <= set(ray_nodes.staying())
        return False

    def close(self) -> None:
        import ray

        self._drop_session()
        self._room.close()
        if self._notices is not None:
            self._notices.close()
        ray.shutdown()
