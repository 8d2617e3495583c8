"""``baton prepare``: records to committed Arrow shards, without workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # as a script: `python launch/prepare.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.cli import config_from, config_parser, run_verb
from launch.exit_codes import ExitCode
from launch.job import prepare_data
from trainer.base_location import locate_base
from trainer.progress_log import say


def main(arguments: Sequence[str]) -> int:
    config = config_from(config_parser("prepare").parse_args(arguments))
    prepare_data(config, locate_base(config.model), say)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
