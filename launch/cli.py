"""``baton VERB …``: each verb is a module of ``launch``; errors become messages and exit codes here, and only here."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from data_shards.errors import BadInput, BatonError
from launch.config import Config, load_config, resolve_paths
from launch.exit_codes import ExitCode
from trainer.errors import DiskFull, RunHeld
from trainer.room import is_out_of_room

VERBS = {
    "prepare": "records to Arrow shards",
    "plan": "memory, disk, steps and batches of a run before it takes a GPU, and whether they fit",
    "finetune": "prepare if needed, train, export if asked; the same command again resumes",
    "submit": "finetune as a job of a Ray cluster, followed to its end",
    "generate": "the same prompts through the base and the tuned model",
    "evaluate": "perplexity and token accuracy of a checkpoint, the base or an exported model",
    "export": "a checkpoint to Hugging Face files",
    "checkpoints": "list or verify a run's checkpoints",
    "runs": "list the runs under a storage path",
    "status": "the story of a run: who holds it, where it stands, what became of each attempt, and its goodput",
    "stop": "ask the launcher that holds a run, on whatever machine, to save and stop",
}


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def config_parser(verb: str) -> argparse.ArgumentParser:
    """A parser with what the verbs that work on a configuration share."""
    parser = argparse.ArgumentParser(prog=f"baton {verb}", description=VERBS[verb])
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    return parser


def config_from(arguments: argparse.Namespace) -> Config:
    from cluster.ray_train import in_ray_job

    return resolve_paths(load_config(arguments.config, arguments.overrides), in_ray_job=in_ray_job())


def _quiet_libraries() -> None:
    """Libraries' chatter would bury the progress lines; warnings and errors stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def run_verb(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run a verb's ``main`` and turn what it raises into a message on stderr and an exit code."""
    _quiet_libraries()
    try:
        return int(main(arguments))
    except BadInput as error:
        print(f"baton: {error}", file=sys.stderr, flush=True)
        return int(ExitCode.BAD_INPUT)
    except RunHeld as error:
        print(f"baton: {error}", file=sys.stderr, flush=True)
        return int(ExitCode.HELD)
    except DiskFull as error:  # under torchrun, where no driver decides
        print(f"baton: {error}", file=sys.stderr, flush=True)
        return int(ExitCode.STOPPED)
    except KeyboardInterrupt:
        print("baton: interrupted; nothing committed is lost", file=sys.stderr, flush=True)
        return int(ExitCode.INTERRUPTED)
    except BatonError as error:
        print(f"baton: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return int(ExitCode.FAILED)
    except OSError as error:
        if error.filename is None:
            traceback.print_exc()  # "No such file or directory" alone would leave everybody guessing
        if is_out_of_room(error):
            print(f"baton: {error}. Make room, and run the command again: it goes on", file=sys.stderr, flush=True)
            return int(ExitCode.STOPPED)
        print(
            f"baton: {error}. Nothing committed is lost; mend it and run the command again", file=sys.stderr, flush=True
        )
        return int(ExitCode.FAILED)


def finished(code: int) -> int:
    """For the end of a script: the code, with which it exits. Under torchrun it exits here, without the interpreter's
    and the libraries' own clean-up: now and then that aborts a process that was in a gloo group, even one that has left
    it ("terminate called without an active exception"), and torchrun takes all others down with it."""
    if under_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def main() -> int:
    """The console script."""
    return finished(_run_named_verb())


def _run_named_verb() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in VERBS:
        verbs = "\n".join(f"  {name:12} {text}" for name, text in VERBS.items())
        print(f"usage: baton VERB …\n\n{verbs}\n\n'baton VERB --help' says more.", file=sys.stderr)
        return int(ExitCode.DONE if sys.argv[1:] in (["--help"], ["-h"]) else ExitCode.BAD_INPUT)
    module = importlib.import_module(f"launch.{sys.argv[1]}")
    return run_verb(module.main, sys.argv[2:])
