"""What a chat template does with the contents of a conversation, told from its syntax tree.

Most templates of ChatML's and Llama's kind do nothing with contents but print them, some without the blanks around. For
those, what a conversation becomes follows from its roles: the text of one with other contents is that text with the
contents exchanged, and need not be rendered.

The tree is read with suspicion: contents may flow through names and sums into what is printed, and nowhere else. A node
that is not known here, or a name that stands for several kinds of thing, and nothing is promised.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache
from typing import Any


class Flow(Enum):
    """What becomes of contents, where a template can be seen through."""

    PRINTED = "printed as they are"
    TRIMMED = "printed, some of them without the blanks around"


class _Kind(Enum):
    """What a name may stand for that depends on contents."""

    CONVERSATION = "messages, or some of them"
    MESSAGE = "one of them"
    TEXT = "contents, perhaps with other text around"


_PLACES = frozenset({"index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"})
"""of a loop; others of its attributes are messages"""
_TYPE_TESTS = frozenset({"defined", "undefined", "none", "string", "mapping", "number", "boolean"})
"""Alike for every plain conversation: a message is a mapping of two texts, and where a name is set does not depend on
them."""


@lru_cache
def content_flow(template: str) -> Flow | None:
    """Of plain conversations (nothing but roles and texts); None where it can't be told."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _Reader().read(_compile_jinja_template(template).environment.parse(template))


class _Reader:
    def __init__(self) -> None:
        self._kinds: dict[str, _Kind] = {"messages": _Kind.CONVERSATION}
        self._trims = False
        self._seen_through = True

    def read(self, tree: Any) -> Flow | None:
        known = -1
        while self._seen_through and known != len(self._kinds):  # A loop may use what is set further down in it.
            known = len(self._kinds)
            self._seen_through = all(map(self._statement, tree.body)) and self._seen_through
        if not self._seen_through:
            return None
        return Flow.TRIMMED if self._trims else Flow.PRINTED

    def _statement(self, node: Any) -> bool:
        from jinja2 import nodes

        match node:
            case nodes.Output():
                return all(map(self._is_printable, node.nodes))
            case nodes.If():
                return self._is_constant(node.test) and all(
                    map(self._statement, [*node.body, *node.elif_, *node.else_])
                )
            case nodes.For(target=nodes.Name(name=name)) if self._is_conversation(node.iter):
                self._set(name, _Kind.MESSAGE)
                test = node.test is None or self._is_constant(node.test)
                return test and not node.recursive and all(map(self._statement, [*node.body, *node.else_]))
            case nodes.For():
                head = [node.iter, *filter(None, [node.test])]
                return all(map(self._is_constant, head)) and all(map(self._statement, [*node.body, *node.else_]))
            case nodes.Assign(target=nodes.Name(name=name)) if not self._is_constant(node.node):
                kind = self._kind_of(node.node)
                if kind is not None:
                    self._set(name, kind)
                return kind is not None
            case _:
                return self._is_constant(node)

    def _set(self, name: str, kind: _Kind) -> None:
        if self._kinds.setdefault(name, kind) != kind or name == "loop":
            self._seen_through = False

    def _kind_of(self, node: Any) -> _Kind | None:
        if self._is_conversation(node):
            return _Kind.CONVERSATION
        if self._is_message(node):
            return _Kind.MESSAGE
        return _Kind.TEXT if self._is_printable(node) else None

    def _is_named(self, node: Any, kind: _Kind) -> bool:
        from jinja2 import nodes

        return isinstance(node, nodes.Name) and self._kinds.get(node.name) == kind

    def _is_conversation(self, node: Any) -> bool:
        from jinja2 import nodes

        match node:
            case nodes.Getitem(arg=nodes.Slice()):
                return self._is_conversation(node.node) and self._is_constant(node.arg)
            case _:
                return self._is_named(node, _Kind.CONVERSATION)

    def _is_message(self, node: Any) -> bool:
        from jinja2 import nodes

        match node:
            case nodes.Getitem() if not isinstance(node.arg, nodes.Slice):
                return self._is_conversation(node.node) and self._is_constant(node.arg)
            case nodes.Filter(name="first" | "last"):
                return self._is_conversation(node.node) and _is_bare(node)
            case _:
                return self._is_named(node, _Kind.MESSAGE)

    def _field(self, node: Any) -> str | None:
        """The name, where this is a field of a message."""
        from jinja2 import nodes

        match node:
            case nodes.Getattr() if self._is_message(node.node):
                return str(node.attr)
            case nodes.Getitem(arg=nodes.Const(value=str(field))) if self._is_message(node.node):
                return field
            case _:
                return None

    def _is_content(self, node: Any) -> bool:
        return self._field(node) == "content"

    def _is_printable(self, node: Any) -> bool:
        """Constant but for contents that stand in it as they are."""
        from jinja2 import nodes

        match node:
            case nodes.Add():
                return self._is_printable(node.left) and self._is_printable(node.right)
            case nodes.Concat():
                return all(map(self._is_printable, node.nodes))
            case nodes.CondExpr():
                results = [node.expr1, *filter(None, [node.expr2])]
                return self._is_constant(node.test) and all(map(self._is_printable, results))
            case nodes.Filter(name="trim") if self._is_content(node.node) and _is_bare(node):
                self._trims = True
                return True
            case _:
                return self._is_content(node) or self._is_named(node, _Kind.TEXT) or self._is_constant(node)

    def _is_constant(self, node: Any) -> bool:
        """The same for all plain conversations of the same roles."""
        from jinja2 import nodes

        match node:
            case nodes.Name():
                return node.name not in self._kinds and node.name not in ("loop", "self", "caller")
            case nodes.Getattr(node=nodes.Name(name="loop")):
                return node.attr in _PLACES
            case nodes.Getattr() | nodes.Getitem() if (field := self._field(node)) is not None:
                return field != "content" and not hasattr(dict, field)  # Its methods give contents away.
            case nodes.Filter(name="length" | "count") if self._is_conversation(node.node) and _is_bare(node):
                return True
            case nodes.Test() if node.name in _TYPE_TESTS and _is_bare(node):
                return self._kind_of(node.node) is not None or self._is_constant(node.node)
            case nodes.Compare(expr=nodes.Const(), ops=[nodes.Operand(op="in" | "notin")]) if self._is_message(
                node.ops[0].expr
            ):
                return True
            case _:
                understood = isinstance(node, _understood())
                return understood and all(map(self._is_constant, node.iter_child_nodes()))


def _is_bare(call: Any) -> bool:
    """A filter or test without arguments."""
    return not (call.args or call.kwargs or call.dyn_args or call.dyn_kwargs)


def _understood() -> tuple[type, ...]:
    """Nodes that depend on nothing but the nodes below them. Others see the whole context, or may be foreign."""
    from jinja2 import nodes

    return (
        *(nodes.Name, nodes.NSRef, nodes.Literal, nodes.Pair, nodes.Keyword, nodes.BinExpr, nodes.UnaryExpr),
        *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice),
        *(nodes.Concat, nodes.Compare, nodes.Operand, nodes.Assign, nodes.Macro, nodes.Output),
    )
