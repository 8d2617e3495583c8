"""``baton evaluate``: perplexity and token accuracy of a checkpoint, the base or an exported model over a split."""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # as a script: `python launch/evaluate.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.failures import root_cause
from cluster.launcher import NEW, Past, WorkerLauncher, launching
from data_shards.errors import BadInput, BatonError
from data_shards.prepare import VALIDATION, Prepared
from data_shards.reading.shard_reader import SplitReader
from launch.cli import config_from, config_parser, finished, run_verb, under_torchrun
from launch.config import Config
from launch.evaluation_subject import (
    Subject,
    base_subject,
    check_data_fits,
    checkpoint_subject,
    folder_subject,
    other_data,
)
from launch.exit_codes import ExitCode
from launch.job import prepare_data
from launch.places import open_run
from launch.torchrun import agree
from trainer.base_location import locate_base
from trainer.config import EvaluationTask, WorkerSpec
from trainer.events import has_trained_on_gpus
from trainer.progress_log import say
from trainer.run_directory import RunDirectory, read_json
from trainer.worker import run_worker


class EvaluationFailed(BatonError):
    """The workers ended without a result; an evaluation has no state, so the same command begins anew."""

    retryable = True


@dataclass(frozen=True)
class Request:
    """Which model, and which split. At most one of the three that choose the model is set."""

    split: str = VALIDATION
    step: int | None = None
    base: bool = False
    folder: Path | None = None


def find_subject(config: Config, request: Request, base: Path) -> Subject:
    if request.base:
        return base_subject(config, base)
    if request.folder is not None:
        return folder_subject(config, base, request.folder)
    return checkpoint_subject(config, base, request.step)


def open_split(dataset: Prepared, split: str) -> SplitReader:
    """Raises BadInput where the data has no such split, or nothing is trained in it."""
    entry = dataset.manifest.splits.get(split)
    if entry is None or not entry.trained_tokens:
        there = ", ".join(name for name, each in dataset.manifest.splits.items() if each.trained_tokens)
        raise BadInput(
            f"--split {split}: the data has no such split, or nothing in it is trained on; there: {there}. "
            "data.validation or data.validation_fraction makes a validation split"
        )
    return SplitReader(dataset.location, dataset.manifest, split)


def make_spec(config: Config, request: Request) -> WorkerSpec:
    """What the workers are told, after everything that can be wrong was looked at. Raises BadInput."""
    base = locate_base(config.model)
    subject = find_subject(config, request, base)
    dataset = prepare_data(config, base, say)
    largest_id = open_split(dataset, request.split).largest_token_id()
    check_data_fits(subject, config, dataset.manifest, largest_id)
    changed = subject.init_from is not None and other_data(config, dataset.manifest)
    if changed:
        say("the data is not what this run was trained on; the result says so (other_data)")
    return WorkerSpec(
        # An evaluation is no attempt of the run: it has its own folder, and the chain of attempts does not see it.
        run_uri=open_run(config).storage.child("evaluations").uri,
        attempt=uuid.uuid4().hex[:12],
        resume_from=None,
        trainer=subject.trainer,
        base_identity=str(subject.about.get("base", "")),
        dataset_uri=dataset.location.uri,
        fingerprint=dataset.manifest.fingerprint,
        init_from=subject.init_from,
        collective_timeout_s=config.cluster.collective_timeout_s,
        resolved_config=config.model_dump(mode="json"),
        evaluation=EvaluationTask(
            split=request.split,
            result=f"{request.split}-{subject.file_stem}.json",
            adapter=subject.adapter,
            about={"title": subject.title, **subject.about, "other_data": changed},
        ),
    )


def run_evaluation(spec: WorkerSpec, launcher: WorkerLauncher, past: Past = NEW) -> dict[str, Any]:
    """The result that the workers wrote. Raises what they failed with: BadInput, or EvaluationFailed."""
    launcher.check_capacity(say, past)
    launcher.check_reach(spec, say)
    num_workers = launcher.wait_for_room(lambda: False, say)
    if not num_workers:
        raise EvaluationFailed("there was no room for the workers in time (cluster.wait_for_room_s); try again later")
    lost = launcher.run(spec, num_workers, lambda request: say(request.reason))
    place = RunDirectory.at(spec.run_uri)
    result = read_result(spec)
    if result is None:
        cause = root_cause(place.errors_of(spec.attempt))
        reason = "; ".join(filter(None, [f"{cause.type}: {cause.message}" if cause else "", lost]))
        if cause is not None and cause.bad_input:
            raise BadInput(cause.message)
        raise EvaluationFailed(f"{reason or 'the workers vanished'}. What they left is in {spec.run_uri}/attempts")
    with suppress(FileNotFoundError):  # a launcher need not have left anything
        place.storage.child("attempts").delete_tree(spec.attempt)
    return result


def read_result(spec: WorkerSpec) -> dict[str, Any] | None:
    """What this very evaluation wrote; None where it did not come to that."""
    assert spec.evaluation is not None, "make_spec sets it"
    result = read_json(RunDirectory.at(spec.run_uri).storage, spec.evaluation.result)
    return result if result is not None and result["evaluation"] == spec.attempt else None


def tell(spec: WorkerSpec, result: dict[str, Any]) -> None:
    assert spec.evaluation is not None, "make_spec sets it"
    say(
        f"{result['title']} on {result['split']}: perplexity {result['perplexity']:.4f}  token accuracy "
        f"{result['accuracy']:.2%} ({result['correct_tokens']:,} of {result['trained_tokens']:,})  loss "
        f"{result['loss']:.5f}  {result['world_size']} workers, {result['seconds']:.1f} s"
    )
    say(f"result in {spec.run_uri}/{spec.evaluation.result}")


def evaluate_under_torchrun(config: Config, request: Request) -> int:
    made: list[WorkerSpec] = []  # rank 0's

    def begin() -> WorkerSpec:
        made.append(make_spec(config, request))
        return made[0]

    spec = agree(begin)
    assert spec is not None, "there is always something to evaluate"
    run_worker(spec)
    for own in made:
        result = read_result(own)
        assert result is not None, "run_worker wrote it on this rank"
        tell(own, result)
    return ExitCode.DONE


def parse(arguments: Sequence[str]) -> tuple[Config, Request]:
    parser = config_parser("evaluate")
    parser.add_argument("--split", default=VALIDATION, help="train or validation; default: validation")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which checkpoint of the run; default: the newest")
    which.add_argument("--base", action="store_true", help="the base as it is, before any training")
    which.add_argument("--model", type=Path, metavar="DIR", help="an exported model, or a peft adapter's folder")
    options: argparse.Namespace = parser.parse_args(arguments)
    folder = options.model.expanduser().absolute() if options.model else None
    if folder is not None and not folder.is_dir():
        raise BadInput(f"--model {options.model}: no such directory; `baton export` makes one")
    return config_from(options), Request(options.split, options.step, options.base, folder)


def main(arguments: Sequence[str]) -> int:
    config, request = parse(arguments)
    if under_torchrun():
        return evaluate_under_torchrun(config, request)
    spec = make_spec(config, request)
    with launching(config.cluster) as launcher:
        # One of a run that has trained without GPUs does not wait for any.
        past = Past(on_gpus=False) if has_trained_on_gpus(open_run(config)) is False else NEW
        result = run_evaluation(spec, launcher, past)
    tell(spec, result)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(finished(run_verb(main, sys.argv[1:])))
