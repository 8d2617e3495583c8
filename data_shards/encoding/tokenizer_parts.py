"""What a ``tokenizers.Tokenizer`` is made of, as its tokenizer.json has it."""

from __future__ import annotations

import json
from typing import Any

_LISTS = {"normalizers", "pretokenizers", "processors"}


def parts_of(component: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor; none of None."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    (key,) = _LISTS & state.keys()
    return [part for each in state[key] for part in _flat(each)]
