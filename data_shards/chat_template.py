"""A conversation to text, and which characters of it the assistant is to learn.

Rendering is transformers' own, in its sandbox: a template is foreign code. Spans are found by rendering, never by
searching the text: where the template marks ``{% generation %}`` they are its own, elsewhere an assistant turn starts
where the conversation before it, rendered with a generation prompt, ends; and it ends where the text that follows a
stand-in for its content begins. That also holds for templates that drop earlier thinking.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from data_shards.config import TrainOn
from data_shards.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])((?:(?!\1).)*)\1\s*\)")
_DATE_USE = re.compile(r"strftime_now(?!\s+is\b)")
_STAND_IN = "BatonStandsInForThisTurn7f3a91"

Messages = Sequence[dict[str, str]]


class Rendered(NamedTuple):
    text: str
    spans: tuple[tuple[int, int], ...]
    """``[start, stop)`` characters to learn, stop token included"""


class CannotMask(Exception):
    """This conversation's assistant turns can't be told from the rest under this template."""


def fix_date(template: str, date: datetime.date) -> str:
    """The template with every ``strftime_now("…")`` replaced by the text that it gives on ``date``.

    Raises DataError where a template computes its format, because then training would depend on the day.
    """
    fixed = _DATE_CALL.sub(lambda match: json.dumps(date.strftime(match[2])), template)
    if _DATE_USE.search(fixed):
        raise DataError(
            "the chat template uses strftime_now other than with a constant format, so its text would change from day "
            "to day; give a template with a fixed date in data.chat_template"
        )
    return fixed


class ChatTemplate:
    """One template with its tokenizer's special tokens."""

    def __init__(
        self,
        template: str,
        special_tokens: dict[str, Any],
        stop_tokens: Sequence[str],
        *,
        date: datetime.date,
        require_stop: bool = True,
    ) -> None:
        self.text = fix_date(template, date)
        self.marks_generation = bool(_GENERATION.search(template))
        self._variables = {**special_tokens, "date_string": date.strftime("%d %b %Y")}
        self._stop_tokens = sorted(filter(None, stop_tokens), key=len, reverse=True)
        self._require_stop = require_stop

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        return self._render(messages, add_generation_prompt, indices=False)[0]

    def _render(
        self, messages: Messages, add_generation_prompt: bool, *, indices: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.text,
            return_assistant_tokens_mask=indices,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
        return rendered[0], (spans[0] if indices else [])

    def render_with_spans(self, messages: Messages, train_on: TrainOn) -> Rendered:
        """Raises CannotMask with the reason, or whatever the template itself raises."""
        if train_on == TrainOn.ALL:
            text = self.render(messages)
            return Rendered(text, ((0, len(text)),))
        if self.marks_generation:
            text, marked = self._render(messages, False, indices=True)
            spans = [(start, self._with_stop(text, start, stop)) for start, stop in marked if stop > start]
        else:
            text = self.render(messages)
            spans = [
                self._span_by_rendering(text, messages, index)
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        return Rendered(text, tuple(spans))

    def _span_by_rendering(self, text: str, messages: Messages, index: int) -> tuple[int, int]:
        try:
            before = self.render(messages[:index], add_generation_prompt=True)
        except TemplateError as error:
            if index:
                raise
            raise CannotMask(
                f"the conversation begins with the assistant, and this template renders no prompt before it ({error}); "
                "begin with a user or system turn"
            ) from error
        if not text.startswith(before):
            raise CannotMask(
                f"rendering the turns before messages[{index}] does not give a beginning of the whole conversation"
            )
        turn = {**messages[index], "content": _STAND_IN}
        parts = self.render([*messages[:index], turn, *messages[index + 1 :]]).split(_STAND_IN)
        if len(parts) != 2 or not text.endswith(parts[1]):
            raise CannotMask(
                f"what follows messages[{index}] depends on its content, or shows it {len(parts) - 1} times"
            )
        start, stop = len(before), len(text) - len(parts[1])
        if stop <= start:
            raise CannotMask(f"messages[{index}] leaves no text of its own")
        return start, self._with_stop(text, start, stop)

    def _with_stop(self, text: str, start: int, stop: int) -> int:
        """The end of a span, moved behind the stop token that follows it (with white space between, as some have)."""
        if any(text[start:stop].rstrip().endswith(token) for token in self._stop_tokens):
            return stop
        rest = text[stop:]
        blank = len(rest) - len(rest.lstrip())
        for token in self._stop_tokens:
            if rest.startswith(token, blank):
                return stop + blank + len(token)
        if self._require_stop:
            raise CannotMask(
                f"no stop token ({', '.join(self._stop_tokens) or 'the tokenizer has none'}) follows the assistant's "
                f"turn, but {rest[:20]!r}: the model would never learn to stop. Mend the template or the tokenizer's "
                "eos_token, or set data.require_stop_token=false"
            )
        return stop
