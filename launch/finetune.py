"""``baton finetune``: one command from records to a tuned model; given again, it carries on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # as a script: `python launch/finetune.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.attempts import Submission, run_attempts
from cluster.config import ClusterConfig, Launcher
from cluster.failures import Action
from cluster.launcher import WorkerLauncher
from launch.cli import config_from, config_parser, run_verb, say
from launch.config import to_yaml
from launch.exit_codes import ExitCode
from launch.export import export_run, find_export
from launch.job import Job, make_job, newest_checkpoint, settle
from launch.torchrun import finetune_as_worker, under_torchrun
from trainer.checkpoint_manifest import Progress
from trainer.run_directory import utc_now, write_json

_EXIT_CODES = {
    Action.FINISH: ExitCode.DONE,
    Action.STOP_RESUMABLE: ExitCode.STOPPED,
    Action.FAIL: ExitCode.FAILED,
    Action.BAD_INPUT: ExitCode.BAD_INPUT,
}


def make_launcher(config: ClusterConfig) -> WorkerLauncher:
    if config.launcher == Launcher.PROCESSES:
        from cluster.local_processes import LocalProcesses

        return LocalProcesses(config)
    from cluster.ray_train import RayTrain

    return RayTrain(config)


def write_result(job: Job, submission: Submission) -> None:
    """``result.json``: how the run stands, for scripts."""
    ref = submission.checkpoint
    progress = asdict(ref.manifest.progress if ref else Progress())
    result = {
        "status": submission.decision.action.value,
        "reason": submission.decision.reason,
        **progress,
        "num_steps": job.sampler.num_steps,
        "attempts": submission.attempts,
        "checkpoint": ref.name if ref else None,
        "written": utc_now(),
    }
    write_json(job.run.storage, "result.json", result)


def describe(job: Job) -> None:
    split = job.dataset.manifest.splits["train"]
    config = job.config
    say(
        f"plan: {split.rows:,} packs of {config.data.seq_len} tokens, {job.sampler.num_steps} steps of "
        f"{config.training.global_batch} packs, {config.cluster.num_workers} workers × micro batch "
        f"{config.training.micro_batch}"
    )


def main(arguments: Sequence[str]) -> int:
    parser = config_parser("finetune")
    parser.add_argument("--dry-run", action="store_true", help="stop before training and print what would run")
    options = parser.parse_args(arguments)
    config = config_from(options)
    if under_torchrun():
        return finetune_as_worker(config)
    print(to_yaml(config), flush=True)
    say(f"run {config.run.name} in {config.run.storage}/{config.run.name}")
    launcher = make_launcher(config.cluster)
    try:
        launcher.check_capacity()
        job = make_job(config, say)
        describe(job)
        if options.dry_run:
            say("dry run: nothing was started")
            return ExitCode.DONE
        standing = settle(job, say)
        if standing.finished:
            say(
                f"the run is finished: step {standing.newest.step if standing.newest else 0} is its last; nothing to do"
            )
        else:
            submission = run_attempts(
                job.run,
                launcher,
                job.spec,
                max_failures_without_progress=config.cluster.max_failures_without_progress,
                allowed_changes=standing.allowed_changes,
                say=say,
            )
            write_result(job, submission)
            say(f"{submission.decision.action.value}: {submission.decision.reason}")
            if submission.decision.action != Action.FINISH:
                return _EXIT_CODES[submission.decision.action]
    finally:
        launcher.close()
    if config.export.at_end and find_export(config, newest_checkpoint(job.run).step) is None:
        export_run(config, job.base)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
