"""``make quickstart``: make a small base and data, fine-tune, and show what was learnt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # as a script: `python launch/quickstart.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import finetune
from launch.cli import run_verb
from launch.config import Config, load_config, resolve_paths
from launch.generate import Generator, Prompt, load_tuned, prompts_from_records
from launch.places import checkpoint_to_export, open_run
from launch.quickstart_inputs import make_inputs
from trainer.model import build_model

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "launch" / "configs" / "quickstart.yaml"
INPUTS = Path("runs/quickstart-inputs")
NUM_PROMPTS = 40


def answers_of(model: Any, config: Config, prompts: list[Prompt]) -> list[str]:
    """The model's answers; right where they equal the expected text to the letter."""
    return Generator(model, config, Path(config.model.base), max_new_tokens=48).complete(prompts)


def show(config: Config) -> None:
    prompts = prompts_from_records(config, NUM_PROMPTS)
    base = Path(config.model.base)
    answers = {
        "before": answers_of(build_model(base, config.model, None, seed=config.seed), config, prompts),
        "after": answers_of(load_tuned(config, base), config, prompts),
    }
    for i, prompt in enumerate(prompts[:3]):
        print(f"\norder     {prompt.text}\nbefore    {answers['before'][i][:90]!r}\nafter     {answers['after'][i]}")
    tuned = checkpoint_to_export(config, open_run(config))
    progress = tuned.manifest.progress
    print(f"\nheld-out loss       before {progress.first_eval_loss:.3f}   after {progress.eval_loss:.3f}")
    before, after = (
        sum(answer == prompt.expected for answer, prompt in zip(given, prompts, strict=True)) / len(prompts)
        for given in answers.values()
    )
    print(f"held-out accuracy   before {before:.0%}     after {after:.0%}   (exact JSON, {len(prompts)} orders)")
    print(f"exported model      {config.run.storage}/{config.run.name}/export/step-{tuned.step:08d}/model")


def main() -> int:
    make_inputs(INPUTS)
    if code := run_verb(finetune.main, ["--config", str(CONFIG), *sys.argv[1:]]):
        return code
    show(resolve_paths(load_config(str(CONFIG), sys.argv[1:]), in_ray_job=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
