"""Which run a command is about: by its configuration, by its folder, or by its name in a storage."""

from __future__ import annotations

import argparse

from data_shards.errors import BadInput
from launch.cli import VERBS, config_from
from launch.places import open_run
from launch.runs import location
from trainer.run_directory import RunDirectory

_CLAIMS = "claims"


def run_parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"baton {verb}", description=VERBS[verb])
    parser.add_argument("--config", help="YAML file of the run; then what else is given changes it, as in finetune")
    parser.add_argument("--storage", help="where runs live; then the run is given by its name")
    parser.add_argument("run", nargs="*", help="the run's folder, <storage>/<name>, or with --storage its name")
    return parser


def run_from(options: argparse.Namespace) -> RunDirectory:
    """Raises BadInput where no run is named, or none is there."""
    if options.config:
        if options.storage:
            raise BadInput("--storage is for a run that is given by its name; with --config give run.storage=…")
        run = open_run(config_from(argparse.Namespace(config=options.config, overrides=options.run)))
    elif len(options.run) != 1:
        raise BadInput("give one run: --config my.yaml, or <storage>/<name>, or <name> --storage <storage>")
    elif options.storage:
        run = RunDirectory(location(options.storage).child(options.run[0]))
    else:
        run = RunDirectory(location(options.run[0]))
    if not (run.storage.exists("run.json") or run.storage.list(_CLAIMS)):
        raise BadInput(f"{run.storage.uri}: no run there (no run.json)")
    return run
