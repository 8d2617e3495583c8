"""Records to token ids and what is trained, through the tokenizer's own offsets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_shards import signed_json
from data_shards.chat_template import CannotMask, ChatTemplate, Rendered
from data_shards.config import DataConfig, TrainOn
from data_shards.errors import DataError
from data_shards.pack import Sequence
from data_shards.records import Record
from data_shards.storage import sha256

_BATCH = 1000


class Encoded(NamedTuple):
    record: Record
    sequence: Sequence


def load_tokenizer(base: Path, *, trust_remote_code: bool = False) -> Any:
    """The base's fast tokenizer. Raises DataError where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(f"model.base={str(base)!r} has no tokenizer that can be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {base} is a slow one, without character offsets, so masks can't be made; save it with "
            "tokenizer.json (AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…))"
        )
    return tokenizer


def stop_tokens(tokenizer: Any, base: Path) -> list[str]:
    """The texts that end a turn: the tokenizer's eos and those of generation_config.json, which may be several."""
    ids = {tokenizer.eos_token_id} - {None}
    config = base / "generation_config.json"
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
        ids |= set(found if isinstance(found, list) else [found]) - {None}
    return sorted(filter(None, tokenizer.convert_ids_to_tokens(sorted(ids))))


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of everything that decides which ids a text becomes."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Saved with some tokenizers, and switched off by the first call here.
    del content["truncation"], content["padding"]
    return sha256(signed_json.canonical(content))


class Encoder:
    """Turns records into sequences with one tokenizer, template and set of options."""

    def __init__(self, tokenizer: Any, config: DataConfig, stops: list[str]) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._template_text = self._find_template()
        self._template = self._template_text and ChatTemplate(
            self._template_text,
            dict(tokenizer.special_tokens_map),
            stops,
            date=config.template_date,
            require_stop=config.require_stop_token,
        )
        self._stops = stops

    def _find_template(self) -> str | None:
        if self._config.chat_template is None:
            own = self._tokenizer.chat_template
            return own.get("default") if isinstance(own, dict) else own
        try:
            return Path(self._config.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"data.chat_template={self._config.chat_template!r} can't be read: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What the ids and masks depend on besides the records: goes into the fingerprint."""
        return {
            "tokenizer": tokenizer_identity(self._tokenizer),
            "special_tokens": sha256(signed_json.canonical(dict(self._tokenizer.special_tokens_map))),
            "template": sha256((self._template_text or "").encode()),
            "stop_tokens": self._stops,
            "template_date": self._config.template_date.isoformat(),
            "train_on": self._config.train_on.value,
        }

    def encode(self, records: Iterable[Record]) -> Iterator[Encoded]:
        """Sequences in the records' order, however long.

        Raises DataError with file and line for a record that can't be rendered or masked, or that trains on nothing.
        """
        iterator = iter(records)
        while batch := list(islice(iterator, _BATCH)):
            rendered = [self._render(record) for record in batch]
            texts = [item.text for item in rendered]
            # Template text has its special tokens in it already; plain text gets what the tokenizer adds by itself.
            encodings = self._encode_batch(texts, add_special_tokens=batch[0].text is not None)
            for record, item, (ids, offsets) in zip(batch, rendered, encodings, strict=True):
                yield Encoded(record, self._sequence(record, item, ids, offsets))

    def _encode_batch(self, texts: list[str], *, add_special_tokens: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        encodings = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, offsets in zip(encodings["input_ids"], encodings["offset_mapping"], strict=True):
            yield np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)

    def _render(self, record: Record) -> Rendered:
        if record.text is not None:
            return Rendered(record.text, ((0, len(record.text)),))
        if not self._template:
            raise DataError(
                f"the tokenizer has no chat template, and {record.path}:{record.line} is a conversation. Use "
                "the instruct model's tokenizer, give a template in data.chat_template, or train on plain text (a "
                "'text' field)"
            )
        try:
            rendered = self._template.render_with_spans(record.messages, self._config.train_on)
        except CannotMask as error:
            raise record.error(
                f"the chat template can't be masked for this record: {error}. Mark the assistant's text in it with "
                "{% generation %}…{% endgeneration %} and pass it as data.chat_template"
            ) from error
        except Exception as error:
            raise record.error(f"the chat template refuses this conversation: {error}") from error
        if not rendered.spans:
            raise record.error("the template marks no assistant text in this conversation, so it trains on nothing")
        return rendered

    def _sequence(self, record: Record, rendered: Rendered, ids: np.ndarray, offsets: np.ndarray) -> Sequence:
        """``ids`` int32 [T], ``offsets`` int64 [T, 2]: characters that each token covers."""
        trained = np.zeros(len(ids), bool)
        for start, stop in rendered.spans:
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < stop)
            # A header's token may take along the blanks that the answer begins with (rstrip, as Phi-3's do).
            for token in np.flatnonzero(inside & (offsets[:, 0] < start)):
                before, within = rendered.text[offsets[token, 0] : start], rendered.text[start : offsets[token, 1]]
                inside[token] = not before.strip() or bool(within.strip())
            trained |= inside
        if record.text is not None:
            eos = self._tokenizer.eos_token_id
            if eos is not None and (not len(ids) or ids[-1] != eos):
                ids = np.append(ids, np.int32(eos))
            trained = np.ones(len(ids), bool)
        if self._config.train_on == TrainOn.ALL:
            trained[:] = True
        sequence = Sequence(ids, trained)
        if sequence.num_targets == 0:
            raise record.error(f"none of its {len(ids)} tokens would be trained, so it teaches nothing")
        return sequence
