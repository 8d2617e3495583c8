"""``baton finetune``: one command from records to a tuned model; given again, it carries on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

if __package__ in (None, ""):  # as a script: `python launch/finetune.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.attempt_end import newest_usable_of
from cluster.attempts import run_attempts
from cluster.failures import Action
from cluster.launcher import Past, WorkerLauncher, launching
from cluster.lease import Lease, holding
from cluster.run_metrics import RunState
from data_shards.errors import BadInput, BatonError
from launch.cli import config_from, config_parser, finished, run_verb, under_torchrun
from launch.config import Config, to_yaml
from launch.exit_codes import ExitCode
from launch.job import Job, Standing, export_if_asked, make_job, settle, tell_finished, write_result
from launch.places import open_run, open_run_to_write
from launch.plan import find_problem, report_of
from launch.plan_inputs import Target, find_target, plan_of_prepared
from launch.plan_report import Report
from launch.plan_text import lines_of
from launch.torchrun import finetune_as_worker
from trainer.errors import RunHeld
from trainer.events import has_trained_on_gpus
from trainer.progress_log import say
from trainer.room import is_out_of_room

_EXIT_CODES = {
    Action.FINISH: ExitCode.DONE,
    Action.STOP_RESUMABLE: ExitCode.STOPPED,
    Action.FAIL: ExitCode.FAILED,
    Action.BAD_INPUT: ExitCode.BAD_INPUT,
}
_END_STATES = {Action.FINISH: RunState.FINISHED, Action.STOP_RESUMABLE: RunState.STOPPED}


def describe(job: Job) -> None:
    split = job.dataset.manifest.splits["train"]
    config = job.config
    say(
        f"plan: {split.rows:,} packs of {config.data.seq_len} tokens, {job.sampler.num_steps} steps of "
        f"{config.training.global_batch} packs, {config.cluster.num_workers} workers × micro batch "
        f"{config.training.micro_batch}"
    )


def make_plan(job: Job, target: Target) -> tuple[Report, str | None]:
    """What `baton plan` says, with the data as it was prepared, and what does not fit. Raises BadInput where that can't
    be told."""
    data = plan_of_prepared(job.dataset.manifest)
    report = report_of(job.config, data, target, job.base)
    return report, find_problem(job.config, data, report, job.base)


def show_plan(job: Job) -> None:
    """Raises BadInput where the run surely does not fit, or that can't be told."""
    report, problem = make_plan(job, find_target(job.config))
    print("\n".join(lines_of(report)), flush=True)
    if problem and not report.target.assumed:
        raise BadInput(f"the run does not fit: {problem}")
    if problem:  # the workers' machines may have what this one has not
        say(f"here the run would not fit: {problem}")


def check_fits(job: Job, standing: Standing) -> None:
    """Raises BadInput where a new run surely does not fit. One that has trained is only told of: it may fit after all.
    Nothing is said where it is not known here what the workers' machines have."""
    try:
        target = find_target(job.config)
    except BadInput:
        return
    if target.assumed:
        return
    try:
        _, problem = make_plan(job, target)
    except BadInput as error:  # of a model, say, that is not described like Llama: it can be trained all the same
        say(f"whether the run fits is not known: {error}")
        return
    if problem is None:
        return
    if standing.newest is None:
        raise BadInput(f"the run does not fit: {problem}. `baton plan` shows the whole plan")
    say(f"by its plan the run does not fit: {problem}")


def main(arguments: Sequence[str]) -> int:
    parser = config_parser("finetune")
    parser.add_argument("--dry-run", action="store_true", help="stop before training and print what would run")
    parser.add_argument(
        "--take-over", action="store_true", help="take the run from a launcher that holds it and can't be stopped"
    )
    options = parser.parse_args(arguments)
    config = config_from(options)
    if under_torchrun():
        if options.dry_run:
            raise BadInput("--dry-run prints what would run once; give it without torchrun")
        return finetune_as_worker(config, take_over=options.take_over)
    print(to_yaml(config), flush=True)
    say(f"run {config.run.name} in {config.run.storage}/{config.run.name}")
    if options.dry_run:
        return dry_run(config)
    # First of all: of two that prepare the same data one would do it for nothing, and a refusal should come at once.
    with holding(open_run_to_write(config), say, take_over=options.take_over) as lease:
        return carry_on(config, lease)


def dry_run(config: Config) -> int:
    with launching(config.cluster) as launcher:
        launcher.check_capacity(say, Past(on_gpus=has_trained_on_gpus(open_run(config))))
        job = make_job(config, say)
        describe(job)
        settle(job, say, record=False)
        show_plan(job)
    say("dry run: nothing was started")
    return ExitCode.DONE


def carry_on(config: Config, lease: Lease) -> int:
    """From wherever the run stands to its end, or to what ends this submission."""
    with launching(config.cluster) as launcher:
        if not open_run(config).lineage():
            launcher.check_capacity(say)
        job = make_job(config, say)
        describe(job)
        action = train(job, launcher, lease)
    if action == Action.FINISH:
        lease.when_asked_to_stop(None)  # an export is ended, and begun anew or gone on with by the next command
        export_if_asked(job, lease)
    return _EXIT_CODES[action]


def train(job: Job, launcher: WorkerLauncher, lease: Lease) -> Action:
    """Carry the run on until the policy ends it, or say that there is nothing to do.

    Raises RunHeld where another launcher takes it over.
    """
    standing = settle(job, say)
    if standing.why_finished:
        tell_finished(job, lease, standing, say)
        return Action.FINISH
    if job.run.lineage():  # a new run's was checked before its data was prepared
        launcher.check_capacity(say, Past(has_begun=True, on_gpus=has_trained_on_gpus(job.run)))
    check_fits(job, standing)
    launcher.check_reach(job.spec("", standing.newest), say)
    monitor = launcher.open_monitor(job.config.run.name, job.run.storage.uri, job.config.metrics)
    ended = RunState.FAILED
    try:
        submission = run_attempts(
            job.run,
            launcher,
            job.spec,
            lease=lease,
            max_failures_without_progress=job.config.cluster.max_failures_without_progress,
            stop_grace_s=job.config.cluster.stop_grace_s,
            monitor=monitor,
            allowed_changes=standing.allowed_changes,
            say=say,
        )
    except RunHeld:
        ended = RunState.STOPPED
        raise
    except Exception as error:
        record_failure(job, lease, error)
        raise
    else:
        decision = submission.decision
        write_result(job, lease, submission.checkpoint, decision.action.value, decision.reason)
        say(f"{decision.action.value}: {decision.reason}")
        ended = _END_STATES.get(decision.action, RunState.FAILED)
        return decision.action
    finally:
        monitor.close(ended)


def record_failure(job: Job, lease: Lease, error: Exception) -> None:
    """For scripts, and for `baton stop`, which waits for it; unless the storage is what failed, or the run is lost."""
    with suppress(OSError, BatonError):
        lease.check()
        status = Action.STOP_RESUMABLE if is_out_of_room(error) else Action.FAIL  # as the exit code says
        write_result(job, lease, newest_usable_of(job.run), status.value, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    sys.exit(finished(run_verb(main, sys.argv[1:])))
