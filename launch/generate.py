"""``baton generate``: the same prompts through the base and the tuned model, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # as a script: `python launch/generate.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from data_shards.corpus import records_of
from data_shards.encoding.chat_template import fix_date
from data_shards.encoding.encoder import load_tokenizer, stop_tokens
from data_shards.errors import BadInput
from data_shards.prepare import TRAIN, VALIDATION
from launch.cli import config_from, config_parser, run_verb
from launch.config import Config
from launch.exit_codes import ExitCode
from launch.export import export_run, find_export
from launch.places import checkpoint_to_export, open_run, recorded_settings
from trainer.base_location import locate_base
from trainer.config import Method
from trainer.model import build_model
from trainer.progress_log import say


@dataclass(frozen=True)
class Prompt:
    messages: tuple[dict[str, str], ...]
    """up to the turn that the model shall write; or none, for plain text"""
    text: str
    expected: str | None = None


def prompts_from_records(config: Config, count: int) -> list[Prompt]:
    """The first held-out records (training ones if nothing is held out), cut before their last answer."""
    split = VALIDATION if config.data.holds_out else TRAIN
    prompts = []
    for record in islice(records_of(config.data, split), count):
        if record.text is not None:
            half = record.text[: len(record.text) // 2]
            prompts.append(Prompt((), half, record.text[len(half) :]))
            continue
        last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        before = record.messages[:last]
        prompts.append(Prompt(before, before[-1]["content"] if before else "", record.messages[last]["content"]))
    return prompts


class Generator:
    """Greedy completions of one model."""

    def __init__(self, model: Any, config: Config, base: Path, max_new_tokens: int) -> None:
        self._model = model.eval()
        self._model.config.use_cache = True
        self._tokenizer = load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
        self._stops = self._tokenizer.convert_tokens_to_ids(stop_tokens(self._tokenizer, base))
        self._max_new_tokens = max_new_tokens
        template = self._tokenizer.chat_template
        if config.data.chat_template:
            template = Path(config.data.chat_template).read_text(encoding="utf-8")
        self._template = template and fix_date(template, config.data.template_date)

    def _text(self, prompt: Prompt) -> str:
        if not prompt.messages:
            return prompt.text
        if not self._template:
            raise BadInput("the tokenizer has no chat template; give prompts as held-out text records instead")
        return self._tokenizer.apply_chat_template(
            list(prompt.messages), chat_template=self._template, add_generation_prompt=True, tokenize=False
        )

    @torch.no_grad()
    def complete(self, prompts: Sequence[Prompt]) -> list[str]:
        """One batch, padded on the left so that all continue at the same position."""
        from_template = bool(prompts and prompts[0].messages)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        texts = [self._text(prompt) for prompt in prompts]
        inputs = self._tokenizer(texts, add_special_tokens=not from_template, padding=True, return_tensors="pt")
        inputs = inputs.to(self._model.device)
        output = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=self._stops or None,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        written = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._tokenizer.batch_decode(written, skip_special_tokens=True)]


def load_tuned(config: Config, base: Path) -> Any:
    """The checkpoint that an export would be of as a transformers (or peft) model, exported first if it isn't yet."""
    ref = checkpoint_to_export(config, open_run(config))
    if find_export(config, ref) is None:
        export_run(config, base, step=ref.step, say=say)
    place = find_export(config, ref)
    assert place is not None, "export_run has just made it"
    if place.local_path is None:
        raise BadInput(f"generate needs a local export; this one is at {place.uri}. Copy it, or use a shared path")
    was = recorded_settings(config, ref)
    if was.training.method == Method.LORA:
        from peft import PeftModel

        model = build_model(base, was.model, None, seed=was.seed)
        return PeftModel.from_pretrained(model, str(place.local_path))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place.local_path, dtype="auto")


def main(arguments: Sequence[str]) -> int:
    parser = config_parser("generate")
    parser.add_argument("--prompt", action="append", help="a prompt (repeatable); default: held-out records")
    parser.add_argument("--count", type=int, default=5, help="how many held-out records")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args(arguments)
    config = config_from(options)
    base = locate_base(config.model)
    if options.prompt:
        prompts = [Prompt(({"role": "user", "content": text},), text) for text in options.prompt]
    else:
        prompts = prompts_from_records(config, options.count)
    models = {"base": build_model(base, config.model, None, seed=config.seed), "tuned": load_tuned(config, base)}
    answers = {
        name: Generator(model, config, base, options.max_new_tokens).complete(prompts) for name, model in models.items()
    }
    for i, prompt in enumerate(prompts):
        print(f"\nprompt    {prompt.text}")
        for name, given in answers.items():
            print(f"{name:9} {given[i]!r}")
        if prompt.expected is not None:
            print(f"expected  {prompt.expected!r}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
