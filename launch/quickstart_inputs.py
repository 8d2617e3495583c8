"""What the quickstart learns from: orders at a counter, written as a sentence, to be turned into JSON.

The records, a byte-pair tokenizer trained on them and a small random Llama are made here, so that nothing is
downloaded.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SIZES = ("small", "medium", "large")
ITEMS = (
    "mushroom pizza", "tomato soup", "lentil curry", "apple pie", "green salad", "fish burger", "veggie wrap",
    "noodle bowl", "bean burrito", "cheese omelette",
)  # fmt: skip
EXTRAS = ("olives", "garlic", "chili", "onions", "cheese", "nuts")
NAMES = ("Ada", "Ben", "Chloe", "Dmitri", "Elif", "Femi", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena")
NUMBERS = ("one", "two", "three", "four", "five")
SENTENCES = (
    "Hi, it's {name}. {number} {size} {item} with extra {extra}, please.",
    "Could I get {number} {size} {item}? Add {extra}. The name is {name}.",
    "{name} here: I'd like {number} {size} {item}, {extra} on top.",
    "For {name}, {number} times the {size} {item} and some {extra}.",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def records(count: int, seed: int) -> list[dict[str, str]]:
    """Distinct ``{"question", "answer"}`` records."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        name, item, extra = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(EXTRAS)
        size, number = rng.choice(SIZES), rng.randrange(len(NUMBERS))
        question = rng.choice(SENTENCES).format(name=name, number=NUMBERS[number], size=size, item=item, extra=extra)
        order = {"item": item, "size": size, "count": number + 1, "extra": extra, "name": name}
        found[question] = json.dumps(order)
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_base(path: Path, texts: list[str], *, num_layers: int = 3) -> None:
    """A tokenizer trained on ``texts`` and a Llama of random parameters, with three layers about 0.7 M."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(0)
    hidden_size = 128
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        initializer_range=hidden_size**-0.5,  # the usual 0.02 is for wide models; so narrow a one learns slowly by it
        intermediate_size=352,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def make_inputs(folder: Path, *, num_train: int = 3000, num_validation: int = 100) -> None:
    """``train.jsonl``, ``validation.jsonl`` and ``base/`` in ``folder``, unless they are there already."""
    complete = folder / "complete"
    if complete.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = records(num_train + num_validation, seed=1)
    write_jsonl(folder / "train.jsonl", rows[num_validation:])
    write_jsonl(folder / "validation.jsonl", rows[:num_validation])
    make_base(folder / "base", [f"{row['question']}\n{row['answer']}" for row in rows[num_validation:]])
    complete.touch()
