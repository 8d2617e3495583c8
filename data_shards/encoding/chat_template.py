"""A conversation to text, and which characters of it the assistant is to learn.

Rendering is transformers' own, in its sandbox: a template is foreign code. Where the template marks
``{% generation %}``, its spans count; elsewhere they are found by rendering (``turn_bounds.py``). That takes two
renderings a turn besides the conversation's own, several times what the tokenizer takes. So for plain conversations it
is done once for all of one shape (``conversation_shape.py``), and each then costs one rendering, or none at all where
the template does nothing with contents but print them (``template_flow.py``).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from data_shards.config import TrainOn
from data_shards.encoding.conversation_shape import Shape, learn_shape
from data_shards.encoding.template_fields import UnusedFields
from data_shards.encoding.template_flow import Flow, content_flow
from data_shards.encoding.turn_bounds import CannotMask, Messages, Span, Tools, TurnBounds
from data_shards.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])((?:(?!\1).)*)\1\s*\)")
_DATE_USE = re.compile(r"strftime_now(?!\s+is\b)")
_MAX_SHAPES = 10_000  # Some MB. What does not fit is rendered as often as it takes.


class Rendered(NamedTuple):
    text: str
    spans: tuple[Span, ...]
    """``[start, stop)`` characters to learn, stop token included, in order"""

    @property
    def is_whole(self) -> bool:
        return self.spans == ((0, len(self.text)),)


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


def taught_turns(messages: Messages, train_on: TrainOn) -> list[int]:
    """Indices of the assistant turns to learn; one with ``"weight": 0`` is not."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == TrainOn.LAST:
        turns = turns[-1:]
    return [index for index in turns if messages[index].get("weight") != 0]


def without_weights(messages: Messages) -> Messages:
    """As the template shall see them: weights are for us."""
    if not any("weight" in message for message in messages):
        return messages
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def is_plain(messages: Messages) -> bool:
    """Nothing but roles and texts, so that conversations of the same roles have the same shape."""
    return all(len(message) == 2 and type(message.get("content")) is str for message in messages)


@lru_cache
def _compiled(template: str) -> tuple[Any, dict[str, Any]]:
    """transformers' compiled template in its sandbox, and the names that it gives to all templates."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(template)
    return compiled, dict(compiled.globals)


def between(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """What of ``[0, length)`` none of the ``spans`` covers; they are in order."""
    stops, starts = [0, *(stop for _, stop in spans)], [*(start for start, _ in spans), length]
    return tuple((start, stop) for start, stop in zip(stops, starts, strict=True) if start < stop)


class ChatTemplate:
    """One template with its tokenizer's special tokens. Pickles: what is compiled is kept by transformers."""

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
        self._stop_tokens = tuple(sorted(filter(None, stop_tokens), key=len, reverse=True))
        self._require_stop = require_stop
        self._shapes: dict[tuple[str, ...], Shape | None] = {}
        self._turns = TurnBounds(self.render, self._stop_tokens)
        self._unused_fields = UnusedFields(self.render)

    def render(self, messages: Messages, tools: Tools | None = None, *, add_generation_prompt: bool = False) -> str:
        """Raises what the template raises."""
        return self._render(messages, tools, add_generation_prompt, indices=False)[0]

    def _render(
        self, messages: Messages, tools: Tools | None, add_generation_prompt: bool, *, indices: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=self.text,
            return_assistant_tokens_mask=indices,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
        return rendered[0], (spans[0] if indices else [])

    def _render_plain(self, messages: Messages) -> str:
        """As ``render``, for plain conversations in a third of the time.

        It leaves out the copy of the conversation, which rebuilds objects that a template must not touch (a plain
        conversation has none), and the copy of jinja's globals, which templates can't change.
        """
        template, names = _compiled(self.text)
        given = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": False}
        context = template.new_context(names | given | self._variables, shared=True)
        return "".join(template.root_render_func(context))

    def unused_field(self, messages: Messages, tools: Tools | None) -> str | None:
        """A field of this conversation that the template does not print, as words for an error, or None."""
        return self._unused_fields.find(without_weights(messages), tools)

    def render_with_spans(self, messages: Messages, train_on: TrainOn, tools: Tools | None = None) -> Rendered:
        """Raises CannotMask with the reason, or whatever the template itself raises."""
        taught = taught_turns(messages, train_on)
        clean = without_weights(messages)
        if train_on != TrainOn.ALL:
            text, spans = self._spans(clean, tools, taught)
            return Rendered(text, tuple(spans))
        every = taught_turns(clean, train_on)
        if taught == every:
            text = self._plain(clean)[0] if tools is None and is_plain(clean) else self.render(clean, tools)
            return Rendered(text, ((0, len(text)),))
        text, left_out = self._spans(clean, tools, [index for index in every if index not in taught])
        return Rendered(text, between(left_out, len(text)))

    def _spans(self, messages: Messages, tools: Tools | None, turns: list[int]) -> tuple[str, list[Span]]:
        if self.marks_generation:
            return self._marked_spans(messages, tools, turns)
        if tools is None and is_plain(messages):
            text, shape = self._plain(messages)
            found = shape.bounds([message["content"] for message in messages], turns) if shape else None
            if found is not None:
                return text, self._with_stops(text, found)
        return self.spans_by_rendering(messages, tools, turns)

    def _plain(self, messages: Messages) -> tuple[str, Shape | None]:
        """The text of a plain conversation, and its shape where that explains the text."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._shapes and len(self._shapes) < _MAX_SHAPES:
            self._shapes[roles] = learn_shape(roles, self.text, self.render, self._turns.bounds_for_all)
        shape = self._shapes.get(roles)
        if shape is None:
            return self._render_plain(messages), None
        contents = [message["content"] for message in messages]
        filled, flow = shape.filled(contents), content_flow(self.text)
        if flow == Flow.PRINTED or (flow == Flow.TRIMMED and all(text == text.strip() for text in contents)):
            return filled, shape
        text = self._render_plain(messages)
        return text, shape if text == filled else None

    def _marked_spans(self, messages: Messages, tools: Tools | None, turns: list[int]) -> tuple[str, list[Span]]:
        text, marked = self._render(messages, tools, False, indices=True)
        assistants = taught_turns(messages, TrainOn.ASSISTANT)
        if turns != assistants:
            if len(marked) != len(assistants):
                raise CannotMask(
                    f"it marks {len(marked)} pieces for {len(assistants)} assistant turns, so which of them belong to "
                    f"messages{turns} can't be told"
                )
            marked = [span for span, index in zip(marked, assistants, strict=True) if index in turns]
        return text, self._with_stops(text, [(start, stop) for start, stop in marked if stop > start])

    def _with_stops(self, text: str, bounds: list[Span]) -> list[Span]:
        return [(start, self._with_stop(text, start, stop)) for start, stop in bounds]

    def spans_by_rendering(self, messages: Messages, tools: Tools | None, turns: list[int]) -> tuple[str, list[Span]]:
        """The conversation's text and the spans of its ``turns``, by two more renderings for each of them."""
        text = self.render(messages, tools)
        return text, self._with_stops(text, [self._turns.bounds(text, messages, tools, index) for index in turns])

    def _with_stop(self, text: str, start: int, stop: int) -> int:
        """The end of a span, moved behind the stop token that follows it (with white space between, as some have)."""
        last = stop
        while last > start and text[last - 1].isspace():
            last -= 1
        if text.endswith(self._stop_tokens, start, last):
            return stop
        behind = stop
        while text[behind : behind + 1].isspace():
            behind += 1
        for token in self._stop_tokens:
            if text.startswith(token, behind):
                return behind + len(token)
        if self._require_stop:
            raise CannotMask(
                f"no stop token ({', '.join(self._stop_tokens) or 'the tokenizer has none'}) follows the assistant's "
                f"turn, but {text[stop : stop + 20]!r}: the model would never learn to stop. Mend the template or the "
                "tokenizer's eos_token, or set data.require_stop_token=false"
            )
        return stop
