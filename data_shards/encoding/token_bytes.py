"""Where tokens begin and end in a text, told by their bytes alone.

A byte-level BPE (GPT-2's and all that came from it: Llama 3, Qwen, OLMo) cuts a text's bytes into tokens and leaves
none out. So the lengths of the tokens' bytes, added up, are their offsets, and the tokenizer need not track them: a
table and one sum over a batch take the place of what costs it a tenth of its time. Whatever else a tokenizer does to a
text shows in the sum, or in the bytes themselves; such a text is told apart, and its offsets are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from data_shards.encoding.chat_template import Rendered
from data_shards.encoding.tokenizer_parts import parts_of

_NEVER = 1 << 40
"""Bytes of a token that stands for none in particular: no text is so long, so that the sum gives it away."""
_CUTS_ONLY = {"ByteLevel", "Digits", "Punctuation", "Split"}
_LEAVES_ASCII_ALONE = {"NFC", "NFD", "NFKC", "NFKD"}


class TokenBytes:
    """The bytes of each token of a vocabulary of V."""

    def __init__(self, tokens: dict[int, bytes], num_entries: int, *, exact: bool) -> None:
        """``exact``: nothing is normalised, so the sum of lengths is enough."""
        self._tokens = tokens
        self._exact = exact
        self._lengths = np.full(num_entries, _NEVER, np.int64)  # [V]
        for token, data in tokens.items():
            self._lengths[token] = len(data)

    @classmethod
    def of(cls, backend: Any) -> TokenBytes | None:
        """Of a ``tokenizers.Tokenizer``; None where it is not a byte-level BPE that this holds for."""
        normalizers = {each["type"] for each in parts_of(backend.normalizer)}
        cutters = parts_of(backend.pre_tokenizer)
        behind = parts_of(backend.post_processor)
        model = backend.model
        if (
            type(model).__name__ != "BPE"
            or model.dropout
            or model.continuing_subword_prefix
            or model.end_of_word_suffix
            or not normalizers <= _LEAVES_ASCII_ALONE
            or not {each["type"] for each in cutters} <= _CUTS_ONLY
            or [each["add_prefix_space"] for each in cutters if each["type"] == "ByteLevel"] != [False]
            or any(each.get("trim_offsets") for each in behind)  # its offsets leave out the blanks around words
        ):
            return None
        vocabulary, added = backend.get_vocab(with_added_tokens=False), backend.get_added_tokens_decoder()
        tokens = dict(_vocabulary(vocabulary)) | {number: token.content.encode() for number, token in added.items()}
        tokens.pop(vocabulary.get(model.unk_token), None)
        return cls(tokens, max(*vocabulary.values(), *added) + 1, exact=not normalizers)

    def masks(self, ids: Sequence[np.ndarray], rendered: Sequence[Rendered]) -> list[np.ndarray | None]:
        """As ``trained_tokens``, for a batch of B texts; None where offsets must be looked at.

        Args:
            ids: int32 ``[T]`` of each text, no token added to what the text itself gives.

        Returns bool ``[T]`` for each, views of one array.
        """
        bounds = np.cumsum([0, *map(len, ids)], dtype=np.int64)  # [B + 1] tokens of the texts before each
        starts = np.zeros(bounds[-1] + 1, np.int64)  # bytes before each token, and after the last
        np.cumsum(self._lengths[np.concatenate(ids)] if ids else [], out=starts[1:])
        before = starts[bounds]  # [B + 1] bytes of the texts before each
        trusted = [
            size == length and self._is_text(tokens, each.text)
            for size, length, tokens, each in zip(
                np.diff(before).tolist(), map(_num_bytes, rendered), ids, rendered, strict=True
            )
        ]
        spans = [
            (index, *span)
            for index, (each, first) in enumerate(zip(rendered, before.tolist(), strict=False))
            if trusted[index]
            for span in _byte_spans(each, first)
        ]
        owners, begins, ends = np.array(spans, np.int64).reshape(-1, 3).T
        first, last = np.searchsorted(starts, begins), np.searchsorted(starts, ends)  # tokens [first, last)
        for owner in owners[starts[first] != begins].tolist():
            trusted[owner] = False  # A token reaches over a span's start.
        kept = np.array(trusted, bool)[owners]
        steps = np.zeros(len(starts), np.int8)
        steps[first[kept]] += 1
        steps[last[kept]] -= 1
        trained = np.cumsum(steps, dtype=np.int8).view(bool)
        return [trained[bounds[i] : bounds[i + 1]] if trusted[i] else None for i in range(len(ids))]

    def _is_text(self, ids: np.ndarray, text: str) -> bool:
        """Given that the lengths add up. A normaliser may change characters and keep their number of bytes."""
        return self._exact or text.isascii() or b"".join(map(self._tokens.__getitem__, ids.tolist())) == text.encode()


def _num_bytes(rendered: Rendered) -> int:
    return len(rendered.text) if rendered.text.isascii() else len(rendered.text.encode())


def _byte_spans(rendered: Rendered, first: int) -> Iterator[tuple[int, int]]:
    """The spans as bytes ``[start, stop)`` of a text whose own bytes begin at ``first``."""
    text = rendered.text
    for start, stop in rendered.spans:
        if text.isascii():
            yield first + start, first + stop
        else:
            begin = first + len(text[:start].encode())
            yield begin, begin + len(text[start:stop].encode())


def _vocabulary(vocabulary: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    """Tokens that are written in the alphabet of a byte-level BPE, one character a byte; others are left out."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    for token, number in vocabulary.items():
        with suppress(KeyError):
            yield number, bytes(map(byte_of.__getitem__, token))
