"""Offsets from the bytes of tokens: where they may be relied on, and how texts are told that they don't hold for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data_shards.encoding.chat_template import Rendered
from data_shards.encoding.token_bytes import TokenBytes
from tests.support import tokenizers as families


def gpt2_like() -> Tokenizer:
    """One token a byte; nothing is normalised."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def masked(tokenizer: Tokenizer, text: str, *spans: tuple[int, int]) -> list[bool] | None:
    known = TokenBytes.of(tokenizer)
    assert known is not None
    ids = np.array(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)
    (mask,) = known.masks([ids], [Rendered(text, spans)])
    return None if mask is None else mask.tolist()


def changed(**components: Any) -> Tokenizer:
    tokenizer = gpt2_like()
    for name, component in components.items():
        setattr(tokenizer, name, component)
    return tokenizer


@pytest.mark.parametrize("family", ["llama3", "chatml", "qwen3"])
def test_byte_level_families_are_known(family: str) -> None:
    assert TokenBytes.of(families.FACTORIES[family]().backend_tokenizer)


FOREIGN: dict[str, Tokenizer] = {
    "sentencepiece-like": families.mistral().backend_tokenizer,
    "prefix space": changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no byte level": changed(pre_tokenizer=pre_tokenizers.Whitespace()),
    "metaspace": changed(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "lower case": changed(normalizer=normalizers.Lowercase()),
    "one of several normalisers": changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
    "trimmed offsets": changed(post_processor=processors.ByteLevel(trim_offsets=True)),
    "another model": changed(model=models.WordLevel({"a": 0}, unk_token="a")),
    "dropout": changed(model=models.BPE({"a": 0}, [], dropout=0.5)),
    "suffix": changed(model=models.BPE({"a": 0}, [], end_of_word_suffix="_")),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_tokenizers_are_asked_for_offsets(name: str) -> None:
    assert TokenBytes.of(FOREIGN[name]) is None


def test_spans_are_found_by_bytes() -> None:
    assert masked(gpt2_like(), "ab cd", (1, 3), (4, 5)) == [False, True, True, False, True]
    assert masked(gpt2_like(), "aéb", (1, 2)) == [False, True, True, False]
    assert masked(gpt2_like(), "ab") == [False, False]


def test_token_over_the_start_of_a_span_needs_its_text() -> None:
    tokenizer = gpt2_like()
    tokenizer.add_tokens(["bcd"])
    assert masked(tokenizer, "abcde", (1, 3)) == [False, True, False]  # over its end it does not
    assert masked(tokenizer, "abcde", (2, 5)) is None


def test_blanks_that_a_special_token_takes_along_are_seen() -> None:
    tokenizer = gpt2_like()
    tokenizer.add_special_tokens([AddedToken("<x>", rstrip=True)])
    assert masked(tokenizer, "a<x>b", (4, 5)) == [False, False, True]
    assert masked(tokenizer, "a<x> b", (5, 6)) is None


def test_normaliser_that_keeps_the_number_of_bytes_is_seen() -> None:
    """U+F900 and its normal form U+8C48 take three bytes each; the text is not the tokens' any more."""
    plain, normal = gpt2_like(), changed(normalizer=normalizers.NFC())
    assert masked(plain, "\uf900b", (1, 2)) == [False, False, False, True]
    assert masked(normal, "\uf900b", (1, 2)) is None
    assert masked(normal, "\u8c48b", (1, 2)) == [False, False, False, True]
    assert masked(normal, "ab", (1, 2)) == [False, True]


def test_bytes_that_the_vocabulary_lacks_are_seen() -> None:
    vocabulary = {"a": 0, "b": 1, "<unk>": 2}
    for model in (models.BPE(vocabulary, []), models.BPE(vocabulary, [], unk_token="<unk>")):
        assert masked(changed(model=model), "ab", (1, 2)) == [False, True]
        assert masked(changed(model=model), "acb", (2, 3)) is None
    wide = changed(model=models.BPE({"a": 0, "b": 1, "?": 2}, [], unk_token="?"))
    assert masked(wide, "acb", (2, 3)) is None, "as long as the byte that it stands for, and yet not trusted"


def test_entries_outside_of_the_alphabet_have_no_bytes() -> None:
    """A byte-level tokenizer never makes them; where one does turn up, as what unknown bytes become, it is seen."""
    odd = models.BPE({"a": 0, "b": 1, "\u8c48": 2, " ": 3}, [])
    assert masked(changed(model=odd), "ab", (1, 2)) == [False, True]
    known = TokenBytes.of(changed(model=odd))
    assert known is not None
    for foreign in (2, 3):
        text = Rendered("ab", ((1, 2),))
        assert known.masks([np.array([0, foreign, 1], np.int32)], [text])[0] is None


def test_text_is_doubted_alone() -> None:
    tokenizer = gpt2_like()
    tokenizer.add_special_tokens([AddedToken("<x>", rstrip=True)])
    known = TokenBytes.of(tokenizer)
    assert known is not None
    texts = ["a<x>b", "a<x>  b", "ab", ""]
    ids = [np.array(one.ids, np.int32) for one in tokenizer.encode_batch_fast(texts)]
    spans = [((4, 5),), ((6, 7),), ((0, 1),), ()]
    masks = known.masks(ids, list(map(Rendered, texts, spans)))
    assert [mask if mask is None else mask.tolist() for mask in masks] == [
        [False, False, True],
        None,
        [True, False],
        [],
    ]
