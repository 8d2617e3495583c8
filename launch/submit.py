"""``baton submit``: a run as a job of a Ray cluster, followed to its end."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # as a script: `python launch/submit.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.ray_jobs import JobEnd, JobsApi, JobStatus
from data_shards.errors import BadInput
from launch.cli import config_parser, run_verb
from launch.config import Config, load_config, resolve_paths
from launch.exit_codes import ExitCode
from trainer.progress_log import say

ROOT = Path(__file__).resolve().parent.parent
_MARGIN_S = 60


def main(arguments: Sequence[str]) -> int:
    parser = config_parser("submit")
    parser.add_argument("--address", help="of the cluster's dashboard: http://<head>:8265")
    parser.add_argument("--no-wait", action="store_true", help="submit, and do not follow it to its end")
    parser.add_argument("--take-over", action="store_true", help="as in finetune")
    options = parser.parse_intermixed_args(arguments)
    tree = _tree()
    inside = _inside(tree, options.config)
    config = load_config(options.config, options.overrides)
    resolve_paths(config, in_ray_job=True)  # refuses what the job would refuse
    jobs = JobsApi(options.address)
    job = jobs.submit(
        _command(inside, options),
        tree=tree,
        run=config.run.name,
        env_vars={"RAY_JOB_STOP_WAIT_TIME_S": str(_last_save_s(config))},
        metadata={"run": config.run.name, "storage": config.run.storage},
    )
    say(f"submitted {job}: run {config.run.name} in {config.run.storage}/{config.run.name}")
    if options.no_wait:
        say("it goes on by itself; 'baton status' tells how it stands, 'baton stop' saves and stops it")
        return ExitCode.DONE
    try:
        return _exit_code(job, jobs.follow(job, _show))
    except KeyboardInterrupt:
        say(f"{job} goes on; 'baton stop' saves and stops it")
        return ExitCode.INTERRUPTED


def _tree() -> Path:
    """What is uploaded: the checkout that this command is of. Raises BadInput where it is none."""
    if not (ROOT / "pyproject.toml").is_file():
        raise BadInput(
            f"{ROOT} is an installation, and a job runs from a checkout (its code and your configuration are "
            "uploaded). Give the command from one: python launch/submit.py --config my.yaml"
        )
    return ROOT


def _inside(tree: Path, config: str) -> str:
    """The configuration's path in the tree. Raises BadInput where it is outside: the job would not find it."""
    path = Path(config).resolve()
    if not path.is_relative_to(tree):
        raise BadInput(
            f"--config {config} lies outside of {tree}, of which a copy is what the job sees. Copy the file into it "
            f"(say, to {tree / 'my-runs' / path.name})"
        )
    return str(path.relative_to(tree))


def _command(config: str, options: argparse.Namespace) -> list[str]:
    flags = ["--take-over"] if options.take_over else []
    return ["python", "launch/finetune.py", "--config", config, *flags, *options.overrides]


def _last_save_s(config: Config) -> int:
    """That `ray job stop` leaves a run for its last save before it kills it; Ray's own default is 3 s. Workers wait up
    to twice the commit's timeout."""
    return math.ceil(2 * config.checkpoint.commit_timeout_s) + _MARGIN_S


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _exit_code(job: str, end: JobEnd) -> int:
    """The job's own, as far as Ray tells it."""
    if end.status == JobStatus.SUCCEEDED:
        return ExitCode.DONE
    if end.status == JobStatus.STOPPED:
        say(f"{job} was stopped by `ray job stop`; the same command goes on from the newest checkpoint")
        return ExitCode.STOPPED
    if end.driver_exit_code is None:
        say(f"{job} failed before or beside its command: {end.message}")
        return ExitCode.FAILED
    # A shell that was ended by a signal has the negative number of it.
    return end.driver_exit_code if end.driver_exit_code >= 0 else 128 - end.driver_exit_code


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
