"""``baton export``: a run's checkpoint to files that plain transformers and peft load."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # as a script: `python launch/export.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data_shards.storage import Storage
from launch.cli import config_from, config_parser, run_verb
from launch.config import Config
from launch.exit_codes import ExitCode
from launch.places import check_trained_on, checkpoint_to_export, open_run, recorded_settings
from trainer.base_location import locate_base
from trainer.checkpoint import CheckpointRef
from trainer.config import Method
from trainer.export import ExportSource, export_adapter, export_full, export_merged
from trainer.export_plan import ExportKind
from trainer.progress_log import say
from trainer.run_directory import RunDirectory

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def export_folder(run: RunDirectory, step: int) -> Storage:
    return run.storage.child(f"export/step-{step:08d}")


def find_export(config: Config, ref: CheckpointRef) -> Storage | None:
    """The complete export of this checkpoint, the model or the adapter; None where there is none."""
    first = wanted_kinds(config, recorded_settings(config, ref).training.method)[0]
    return None if first in missing_exports(config, ref) else export_folder(open_run(config), ref.step).child(first)


def wanted_kinds(config: Config, method: Method) -> list[ExportKind]:
    """What the configuration asks for of a run that was trained by this method."""
    if method != Method.LORA:
        return [ExportKind.MODEL]
    return [ExportKind.ADAPTER, *([ExportKind.MERGED] if config.export.merge_lora else [])]


def missing_exports(config: Config, ref: CheckpointRef) -> list[ExportKind]:
    """Kinds that the configuration asks for and that are not there yet."""
    folder, method = export_folder(open_run(config), ref.step), recorded_settings(config, ref).training.method
    return [kind for kind in wanted_kinds(config, method) if not folder.child(kind).exists(kind.mark)]


def export_run(
    config: Config, base: Path, *, step: int | None = None, say: Callable[[str], None] = say
) -> dict[str, Storage]:
    """Export a checkpoint, that of ``checkpoint_to_export``. What its weights mean, it says itself: method, rank, alpha
    and the changes to the base's config are those that it was trained with. What a killed export has finished is kept.

    Returns:
        ``{"model": …}`` for a full-parameter run, ``{"adapter": …}`` and perhaps ``{"merged": …}`` for LoRA.

    Raises BadInput where there is no such checkpoint, or its export would mix it with another base.
    """
    run = open_run(config)
    ref = checkpoint_to_export(config, run, step)
    template = Path(config.data.chat_template).read_text(encoding="utf-8") if config.data.chat_template else None
    was = recorded_settings(config, ref)
    lora = was.training.lora
    source = ExportSource(run.checkpoints, ref, base, was.model, template)
    check_trained_on(config, was, base, ref)
    dtype = _DTYPES[config.export.dtype or was.model.precision.value]
    done: dict[str, Storage] = {}
    for kind in wanted_kinds(config, was.training.method):
        place = done[kind] = export_folder(run, ref.step).child(kind)
        match kind:
            case ExportKind.MODEL:
                export_full(source, place, dtype, report=say)
            case ExportKind.ADAPTER:
                export_adapter(source, lora, place, report=say)
            case ExportKind.MERGED:
                export_merged(source, lora, place, dtype, report=say)
    for name, place in done.items():
        say(f"exported step {ref.step} ({name}): {place.uri}")
    return done


def main(arguments: Sequence[str]) -> int:
    parser = config_parser("export")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest, or the best with export.best")
    options = parser.parse_args(arguments)
    config = config_from(options)
    export_run(config, locate_base(config.model), step=options.step)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
