"""Records to token ids and what is trained, through one rendering a record (``chat_template.py``).

Three renderings through transformers would take 45% of what the tokenizer takes (on GSM8K), one of the compiled
template under 10%.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_shards import signed_json
from data_shards.config import DataConfig
from data_shards.encoding.chat_template import ChatTemplate, Rendered, taught_turns
from data_shards.encoding.masked_tokenizer import MaskedTokenizer, whole_texts
from data_shards.encoding.turn_bounds import CannotMask
from data_shards.errors import DataError
from data_shards.pack import Sequence
from data_shards.sources.records import Record
from data_shards.storage import sha256

_BATCH_CHARACTERS = 1_000_000
"""of text to tokenize at once; the tokenizer's results take some 100 bytes a token"""


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
    return sha256(whole_texts(tokenizer).to_str().encode())


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
        self._masked = MaskedTokenizer(tokenizer)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def stops(self) -> list[str]:
        """Texts of the tokens that end a turn."""
        return self._stops

    @property
    def template_hash(self) -> str:
        return sha256((self._template_text or "").encode())

    def with_template(self, path: str) -> Encoder:
        """The same but for the chat template, which a source may have of its own."""
        config = self._config.model_copy(update={"chat_template": path})
        return Encoder(self._tokenizer, config, self._stops)

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
            "template": self.template_hash,
            "stop_tokens": self._stops,
            "template_date": self._config.template_date.isoformat(),
            "train_on": self._config.train_on.value,
        }

    def encode(self, records: Iterable[Record]) -> Iterator[Encoded]:
        """Sequences in the records' order, however long.

        Raises DataError with file and line for a record that can't be rendered or masked, or that trains on nothing.
        """
        # Template text has its special tokens in it already; plain text gets what the tokenizer adds by itself.
        for is_text, alike in groupby(records, key=lambda record: record.text is not None):
            for batch in _batches((record, self._render(record)) for record in alike):
                sequences = self._masked.encode([rendered for _, rendered in batch], add_special_tokens=is_text)
                for (record, _), sequence in zip(batch, sequences, strict=True):
                    yield Encoded(record, self._checked(record, sequence))

    def _render(self, record: Record) -> Rendered:
        if record.text is not None:
            return Rendered(record.text, ((0, len(record.text)),))
        if not self._template:
            raise DataError(
                f"the tokenizer has no chat template, and {record.path}:{record.line} is a conversation. Use "
                "the instruct model's tokenizer, give a template in data.chat_template, or train on plain text (a "
                "'text' field)"
            )
        tools = record.tools or None
        try:
            if unused := self._template.unused_field(record.messages, tools):
                raise record.error(
                    f"the chat template does not print {unused}, so it would be lost without a trace. Give a template "
                    "that prints it in data.chat_template, or take it out of the record"
                )
            rendered = self._template.render_with_spans(record.messages, self._config.train_on, tools)
        except DataError:
            raise
        except CannotMask as error:
            raise record.error(
                f"the chat template can't be masked for this record: {error}. Mark the assistant's text in it with "
                "{% generation %}…{% endgeneration %} and pass it as data.chat_template"
            ) from error
        except Exception as error:
            raise record.error(f"the chat template refuses this conversation: {error}") from error
        if not rendered.spans:
            raise record.error(self._nothing_to_train(record))
        return rendered

    def _nothing_to_train(self, record: Record) -> str:
        if not taught_turns(record.messages, self._config.train_on):
            return f"its weights leave no assistant turn to train_on={self._config.train_on}, so it trains on nothing"
        return "the template marks no assistant text in this conversation, so it trains on nothing"

    def _checked(self, record: Record, sequence: Sequence) -> Sequence:
        """With an eos token behind plain text that has none."""
        ids, trained = sequence
        eos = self._tokenizer.eos_token_id
        if record.text is not None and eos is not None and (not len(ids) or ids[-1] != eos):
            ids, trained = np.append(ids, np.int32(eos)), np.append(trained, True)
        if trained.tobytes().find(1, 1) < 0:  # any() takes several times as long, on every record.
            raise record.error(f"none of its {len(ids)} tokens would be trained, so it teaches nothing")
        return Sequence(ids, trained)


def _batches(rendered: Iterable[tuple[Record, Rendered]]) -> Iterator[list[tuple[Record, Rendered]]]:
    """In order, each with just enough characters, or what is left."""
    batch: list[tuple[Record, Rendered]] = []
    characters = 0
    for item in rendered:
        batch.append(item)
        characters += len(item[1].text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
