"""Texts to token ids and which of them are trained.

Nearly all of the time is the tokenizer's. On GSM8K with a byte-level BPE of 25,000 entries, one core, as shares of what
``encode_batch`` takes: all offsets as an array 15%; the two ends of a span from the encoding 0.5%; offsets not being
tracked at all (``encode_batch_fast``), which ``token_bytes.py`` makes possible for most models, saves 6-9%; each piece
between spaces tokenised once (``piece_tokenizer.py``) saves two thirds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_shards.encoding.chat_template import Rendered
from data_shards.encoding.piece_tokenizer import PieceTokenizer
from data_shards.encoding.token_bytes import TokenBytes
from data_shards.pack import Sequence


def whole_texts(tokenizer: Any) -> Any:
    """The tokenizer itself, set as transformers sets it before each call: nothing cut, nothing padded.

    Some are saved with either, and any call of transformers may switch them on.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


class MaskedTokenizer:
    """One of transformers' fast tokenizers, with the quickest way to masks that holds for it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes = TokenBytes.of(tokenizer.backend_tokenizer)
        self._pieces = PieceTokenizer.of(tokenizer.backend_tokenizer)

    def encode(self, rendered: list[Rendered], *, add_special_tokens: bool) -> list[Sequence]:
        """In their order. What the tokenizer adds by itself is trained only where the whole text is."""
        backend = whole_texts(self._tokenizer)
        texts = [each.text for each in rendered]
        by_bytes = self._bytes is not None and not add_special_tokens
        if not by_bytes and not all(each.is_whole for each in rendered):
            encodings = backend.encode_batch(texts, add_special_tokens=add_special_tokens)
            return [Sequence(_ids(one), _mask(one, each)) for one, each in zip(encodings, rendered, strict=True)]
        ids = self._ids_of(texts, add_special_tokens=add_special_tokens)
        if self._bytes is None or add_special_tokens:  # and so all texts are whole
            return [Sequence(each, np.ones(len(each), bool)) for each in ids]
        masks = self._bytes.masks(ids, rendered)
        return [
            Sequence(tokens, _mask(backend.encode(each.text, add_special_tokens=False), each) if mask is None else mask)
            for tokens, mask, each in zip(ids, masks, rendered, strict=True)
        ]

    def _ids_of(self, texts: list[str], *, add_special_tokens: bool) -> list[np.ndarray]:
        backend = self._tokenizer.backend_tokenizer
        adds_nothing = not add_special_tokens or not backend.num_special_tokens_to_add(False)
        if self._pieces and adds_nothing and not backend.encode_special_tokens:
            return self._pieces.encode(backend, texts)
        return [_ids(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


def _ids(encoding: Any) -> np.ndarray:
    return np.array(encoding.ids, np.int32)


def _mask(encoding: Any, rendered: Rendered) -> np.ndarray:
    return np.ones(len(encoding), bool) if rendered.is_whole else trained_tokens(encoding, rendered)


def trained_tokens(encoding: Any, rendered: Rendered) -> np.ndarray:
    """Which tokens overlap the spans. ``encoding`` is a ``tokenizers.Encoding`` of T tokens; returns bool ``[T]``."""
    trained = np.zeros(len(encoding), bool)
    for start, stop in rendered.spans:
        if (tokens := _token_range(encoding, start, stop)) is None:
            return trained_by_offsets(np.array(encoding.offsets, np.int64).reshape(-1, 2), rendered)
        trained[tokens[0] : tokens[1]] = True
    return trained


def _token_range(encoding: Any, start: int, stop: int) -> tuple[int, int] | None:
    """Tokens ``[first, last)`` that overlap characters ``[start, stop)``, or None where offsets must be looked at.

    Offsets never go backwards: a normaliser gives each character the place of the one that it was made of, in order
    (``NormalizedString::transform_range`` in tokenizers' normalizer.rs).
    """
    first, last = encoding.char_to_token(start), encoding.char_to_token(stop - 1)
    if first is None or last is None or encoding.token_to_chars(first)[0] < start:
        return None
    last += 1
    # A character of several bytes may have several tokens.
    while (characters := encoding.token_to_chars(last)) is not None and characters[0] < stop:
        last += 1
    return first, last


def trained_by_offsets(offsets: np.ndarray, rendered: Rendered) -> np.ndarray:
    """The rule itself. ``offsets`` int64 ``[T, 2]``: characters that each token covers; returns bool ``[T]``."""
    trained = np.zeros(len(offsets), bool)
    for start, stop in rendered.spans:
        inside = (offsets[:, 1] > start) & (offsets[:, 0] < stop)
        # A header's token may take along the blanks that the answer begins with (rstrip, as Phi-3's do).
        for token in np.flatnonzero(inside & (offsets[:, 0] < start)):
            before, within = rendered.text[offsets[token, 0] : start], rendered.text[start : offsets[token, 1]]
            inside[token] = not before.strip() or bool(within.strip())
        trained |= inside
    return trained
