"""Where a template puts the contents of plain conversations, learnt once for all that have the same roles.

Most templates only print contents, so that the conversations of one sequence of roles differ in nothing else: one
rendering with stand-ins tells the text around the contents, and where in it each turn starts and ends. A conversation
whose own rendering is that text with its contents filled in has its turns at the same places; where the template can be
seen through (``template_flow.py``), that is known without rendering it. Where it is not that text (the template trims,
escapes, or takes thinking out of them), the caller renders as often as it takes.

What is learnt is a function of template and roles alone, never of records seen before: which records come first, and to
which process, can't change a mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any

# Unlike the stand-in that finds a turn's end, also in length: what depends on the content can't hide behind it.
_STAND_IN = "Baton{}StandsInForContent5d0c"
_SLOT = re.compile(_STAND_IN.format(r"(\d+)"))


@dataclass(frozen=True)
class Place:
    """A place in a text: behind the first ``slot`` contents that are printed and ``offset`` characters around them."""

    slot: int
    offset: int


@dataclass(frozen=True)
class Shape:
    """The text around contents.

    ``literals`` ``[S + 1]`` are the texts before, between and behind the S contents that are printed; ``slots`` ``[S]``
    says which messages those are. ``turns`` are the bounds of assistant turns, those that can be told.
    """

    literals: tuple[str, ...]
    slots: tuple[int, ...]
    turns: dict[int, tuple[Place, Place]]

    def filled(self, contents: Sequence[str]) -> str:
        """The text with these contents."""
        pieces = [""] * (2 * len(self.slots) + 1)
        pieces[::2], pieces[1::2] = self.literals, [contents[slot] for slot in self.slots]
        return "".join(pieces)

    def bounds(self, contents: Sequence[str], turns: Sequence[int]) -> list[tuple[int, int]] | None:
        """``[start, stop)`` of each of ``turns`` in the text with these contents, or None where they can't be told."""
        places = [self.turns.get(turn) for turn in turns]
        if None in places:
            return None
        # [S + 1] characters of contents before each slot
        before = list(accumulate((len(contents[slot]) for slot in self.slots), initial=0))
        found = [
            (before[start.slot] + start.offset, before[stop.slot] + stop.offset) for start, stop in filter(None, places)
        ]
        return found if all(start < stop for start, stop in found) else None


def learn_shape(
    roles: Sequence[str],
    template: str,
    render: Callable[[Sequence[dict[str, Any]]], str],
    turn_bounds: Callable[[str, Sequence[dict[str, Any]], None, int], tuple[int, int]],
) -> Shape | None:
    """The shape of conversations with these ``roles``, or None where the template has none to be relied on.

    ``turn_bounds(text, messages, None, index)`` finds a turn by rendering and raises where it can't.
    """
    if not has_constant_prompt(template):
        return None
    messages = [{"role": role, "content": _STAND_IN.format(index)} for index, role in enumerate(roles)]
    try:
        text = render(messages)
    except Exception:  # Foreign code. What it has against these roles it will say of the record itself.
        return None
    pieces = _SLOT.split(text)
    literals, slots = tuple(pieces[::2]), tuple(map(int, pieces[1::2]))
    places = _places(text)
    turns = {}
    for index in (index for index, role in enumerate(roles) if role == "assistant"):
        try:
            start, stop = turn_bounds(text, messages, None, index)
        except Exception:
            continue
        if start in places and stop in places:
            turns[index] = places[start], places[stop]
    return Shape(literals, slots, turns)


def _places(text: str) -> dict[int, Place]:
    """Each position of a text with stand-ins as a place; those inside a stand-in have none."""
    places: dict[int, Place] = {}
    stop = outside = 0
    slot = 0
    for match in chain(_SLOT.finditer(text), [None]):
        end = match.start() if match else len(text)
        places |= {at: Place(slot, outside + at - stop) for at in range(stop, end + 1)}
        outside += end - stop
        slot, stop = slot + 1, match.end() if match else end
    return places


@lru_cache
def has_constant_prompt(template: str) -> bool:
    """Does the generation prompt print the same whatever the conversation says, where it prints anything?

    Then the conversation before a turn, rendered with it, is known from a rendering of the whole. There are templates
    for which that does not hold: where a ``/no_think`` in a message changes the prompt.
    """
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    told = {"messages", "tools", "documents"}
    told |= {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    told |= {macro.name for macro in tree.find_all(nodes.Macro)}
    told -= {"add_generation_prompt"}  # Set where it is not given, which it always is.
    return all(names is not None and not names & told for names in _prompt_names(tree, frozenset()))


def _prompt_names(node: Any, guards: frozenset[str]) -> Iterator[frozenset[str] | None]:
    """For each place that looks at add_generation_prompt: the names that it depends on; None: it can't be told."""
    from jinja2 import nodes

    for child in node.iter_child_nodes():
        if "add_generation_prompt" not in _names(child):
            continue
        if isinstance(child, nodes.If) and "add_generation_prompt" not in _names(child.test):
            yield from _prompt_names(child, guards | _names(child.test))
        elif isinstance(child, nodes.For) and "add_generation_prompt" not in _names(child.iter):
            # Which turn it is counts by its place; the loop's own test would count by its content.
            yield from _prompt_names(child, guards | (_names(child.test) if child.test else frozenset()))
        elif isinstance(child, nodes.If | nodes.Output):
            yield guards | _names(child)
        else:
            yield None


def _names(node: Any) -> frozenset[str]:
    from jinja2 import nodes

    own = {node.name} if isinstance(node, nodes.Name) else set()
    return frozenset(own | {name.name for name in node.find_all(nodes.Name)})
