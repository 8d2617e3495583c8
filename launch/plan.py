"""``baton plan``: what a run will need, before it takes a GPU. Needs neither GPU nor weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # as a script: `python launch/plan.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.errors import BadInput
from launch.cli import config_from, config_parser, run_verb
from launch.config import Config
from launch.exit_codes import ExitCode
from launch.job import check_length
from launch.plan_inputs import DataPlan, Target, find_hf_config, find_target, free_disk_bytes, look_at_data
from launch.plan_report import Report, as_json, make_report
from launch.plan_text import lines_of, problem
from trainer.config import Method
from trainer.model_shape import model_shape


def report_of(config: Config, data: DataPlan, target: Target, base: Path | None = None) -> Report:
    """Raises ModelError or BadInput for a model that can't be planned for.

    Args:
        base: where the base lies, if that is known.
    """
    hf_config, source = find_hf_config(config, base)
    check_length(config, hf_config)
    precision, method, lora = config.model.precision, config.training.method, config.training.lora
    shape = model_shape(hf_config, precision, method, lora)
    other = model_shape(hf_config, precision, Method.LORA, lora) if method == Method.FULL else None
    return make_report(config, shape, source, data, target, free_disk_bytes(config), other)


def find_problem(
    config: Config, data: DataPlan, report: Report, base: Path | None = None, memory_gib: float | None = None
) -> str | None:
    """What does not fit, be it with the fewest workers that may have to do (``cluster.workers.min``), as each of those
    holds more. None where all fits.

    Args:
        memory_gib: of one GPU, where it is not the configuration's.
    """
    found, bounds = problem(report), config.cluster.workers
    if found or bounds is None or bounds.min == bounds.max:
        return found
    cluster = config.cluster.model_copy(update={"num_workers": bounds.min, "workers": None})
    fewest = config.model_copy(update={"cluster": cluster})
    target = find_target(fewest, memory_gib, min(report.target.workers_per_node, bounds.min))
    found = problem(report_of(fewest, data, target, base))
    return f"with cluster.workers.min={bounds.min}: {found}" if found else None


def main(arguments: Sequence[str]) -> int:
    parser = config_parser("plan")
    parser.add_argument("--gpu-memory-gib", type=float, help="of one GPU; default: cluster.gpu_memory_gib")
    parser.add_argument("--gpus-per-node", type=int, help="default: cluster.gpus_per_node")
    parser.add_argument("--json", action="store_true", help="every figure as one JSON object, in bytes")
    options = parser.parse_args(arguments)
    config = config_from(options)
    target = find_target(config, options.gpu_memory_gib, options.gpus_per_node)
    data = look_at_data(config)
    report = report_of(config, data, target)
    print(json.dumps(as_json(report), indent=1) if options.json else "\n".join(lines_of(report)), flush=True)
    if found := find_problem(config, data, report, memory_gib=options.gpu_memory_gib):
        raise BadInput(f"the run does not fit: {found}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
