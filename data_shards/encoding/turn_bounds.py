"""Where in a rendered conversation an assistant turn starts and ends, found by rendering parts of it.

Never by searching the text, which may hold anything. A turn starts where the conversation before it, rendered with a
generation prompt, ends; where the prompt goes on with what this turn lacks, as far as the two agree. It ends where the
text that follows a stand-in for its content begins. That also holds for templates that drop earlier thinking. A turn
with tool calls ends where the text that follows a plain turn in its place begins, or where the conversation up to it
ends: what the template prints for the calls is what the assistant generates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError

_STAND_IN = "BatonStandsInForThisTurn7f3a91"

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]]
Span = tuple[int, int]


class CannotMask(Exception):
    """This conversation's assistant turns can't be told from the rest under this template."""


class TurnBounds:
    """Finds turns by ``render(messages, tools, add_generation_prompt=)``, which raises what the template raises."""

    def __init__(self, render: Callable[..., str], stop_tokens: tuple[str, ...]) -> None:
        self._render = render
        self._stop_tokens = stop_tokens

    def bounds(self, text: str, messages: Messages, tools: Tools | None, index: int) -> Span:
        """What of ``text`` is the turn at ``index``, possibly without the stop token that follows it."""
        prompted = self._prompted(messages, tools, index)
        if text.startswith(prompted):
            start = len(prompted)
        else:
            start = self._header_stop(text, prompted, messages, tools, index)
        return start, self._turn_stop(text, messages, tools, index, start)

    def bounds_for_all(self, text: str, messages: Messages, tools: Tools | None, index: int) -> Span:
        """As ``bounds``, but for a start that an answer can move, by beginning with what the prompt goes on with."""
        prompted = self._prompted(messages, tools, index)
        if not text.startswith(prompted):
            raise CannotMask("the prompt says more than this turn")
        return len(prompted), self._turn_stop(text, messages, tools, index, len(prompted))

    def _prompted(self, messages: Messages, tools: Tools | None, index: int) -> str:
        """The conversation before a turn, with the prompt for it."""
        try:
            return self._render(messages[:index], tools, add_generation_prompt=True)
        except TemplateError as error:
            if index:
                raise
            raise CannotMask(
                f"the conversation begins with the assistant, and this template renders no prompt before it ({error}); "
                "begin with a user or system turn"
            ) from error

    def _turn_stop(self, text: str, messages: Messages, tools: Tools | None, index: int, start: int) -> int:
        find = self._calls_stop if messages[index].get("tool_calls") else self._content_stop
        stop = find(text, messages, tools, index)
        if stop <= start:
            raise CannotMask(f"messages[{index}] leaves no text of its own")
        return stop

    def _header_stop(self, text: str, prompted: str, messages: Messages, tools: Tools | None, index: int) -> int:
        """Where the header of a turn ends whose prompt says more, ``<think>`` say, than stands in the conversation.

        It is what the prompt and a turn with any content have in common, behind the turns before.
        """
        before = self._render(messages[:index], tools)
        turn = {**messages[index], "content": _STAND_IN}
        shown = self._render([*messages[:index], turn, *messages[index + 1 :]], tools).partition(_STAND_IN)[0]
        header = commonprefix([prompted, shown])  # noqa: RUF071 - characters, not parts of a path
        if not (text.startswith(header) and header.startswith(before) and len(header) > len(before)):
            raise CannotMask(
                f"rendering the turns before messages[{index}] does not give a beginning of the whole conversation"
            )
        return len(header)

    def _content_stop(self, text: str, messages: Messages, tools: Tools | None, index: int) -> int:
        turn = {**messages[index], "content": _STAND_IN}
        parts = self._render([*messages[:index], turn, *messages[index + 1 :]], tools).split(_STAND_IN)
        if len(parts) != 2 or not text.endswith(parts[1]):
            raise CannotMask(
                f"what follows messages[{index}] depends on its content, or shows it {len(parts) - 1} times"
            )
        return len(text) - len(parts[1])

    def _calls_stop(self, text: str, messages: Messages, tools: Tools | None, index: int) -> int:
        """Where a turn with tool calls ends, which come behind its content."""
        plain = {key: value for key, value in messages[index].items() if key != "tool_calls"}
        try:
            return self._content_stop(text, [*messages[:index], plain, *messages[index + 1 :]], tools, index)
        except (CannotMask, TemplateError):
            pass  # A turn with calls ends otherwise than a plain one, or none may stand before the tool's answer.
        upto = self._render(messages[: index + 1], tools)
        if not text.startswith(upto):
            raise CannotMask(f"where the tool calls of messages[{index}] end can't be told")
        closed = upto.rstrip()
        return len(closed) if closed.endswith(self._stop_tokens) else len(upto)
