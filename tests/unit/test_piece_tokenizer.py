"""Texts cut at their spaces give the ids of the whole text, for every tokenizer that is taken for one of those."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_shards.encoding import piece_tokenizer
from data_shards.encoding.piece_tokenizer import PieceTokenizer
from tests.support import tokenizers as families

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im_end|>!", "<x>"]
# As the tokenizer.json of gpt-oss, Mistral NeMo, Llama 3 and Qwen 3 have them.
PATTERNS = {
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "qwen3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
        r"|\s+"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
TEXTS = [
    *families.SENTENCES,
    "  in\n\n   deep\t\t code  { x:  1 }",
    " .  . \n \n 12 345  6789 's 't IT'S",
    "é ü ß 漢字 かな",
]


def tokenizer_of(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """Merges over blanks and signs too, so that a wrong cut shows."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


def split_by(pattern: str, *before: Any, behavior: str = "isolated") -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), behavior=behavior)]
    return pre_tokenizers.Sequence([*before, *steps, pre_tokenizers.ByteLevel(False, use_regex=False)])


KNOWN: dict[str, Tokenizer] = {
    "gpt2": tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    **{name: tokenizer_of(split_by(pattern)) for name, pattern in PATTERNS.items()},
    "normal form": tokenizer_of(split_by(PATTERNS["qwen3"]), normalizers.NFC()),
}

SNIPPETS = [
    *SPECIAL, " ", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\u200b", "\0",
    "a", "word", "IT'S", "'s", "'", "12", "7", "é", "e\u0301", "\u0301", "漢字", "🙂", ".", "...", "/", "!", "<", "|>",
    "im_end",
]  # fmt: skip
ANY_TEXT = st.lists(st.sampled_from(SNIPPETS), max_size=25).map("".join) | st.text(max_size=40)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("name", KNOWN)
def test_pieces_give_the_ids_of_the_text(name: str) -> None:
    tokenizer = KNOWN[name]
    pieces = PieceTokenizer.of(tokenizer)
    assert pieces is not None

    @settings(max_examples=500, deadline=None)
    @given(st.lists(ANY_TEXT, max_size=4))
    @example(["<|im_end|>", "", " ", "a" * 200, "a" * 200 + " b"])
    def check(texts: list[str]) -> None:
        found = [ids.tolist() for ids in pieces.encode(tokenizer, texts)]
        assert found == [plain_ids(tokenizer, text) for text in texts]

    check()


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        (["<x>", "<|end of turn|>"], ["hi <|end of turn|> there"]),
        (["---"], ["a-", " b", " c-", "--- - --"]),
        (["|||IP|||", "<y>"], ["a |||IP b", " c|||", "|||IP|||"]),
        (["<s>", "<s>!"], ["\0<s>b", "!a", "<s>!a <s> !"]),
        (["ab", "bc", "<s>"], ["abc", "c b", " a", "bc ab abc"]),
    ],
)
def test_added_tokens_of_any_shape(tokens: list[str], texts: list[str]) -> None:
    tokenizer = without_added_tokens()
    tokenizer.add_special_tokens(tokens)
    pieces = PieceTokenizer.of(tokenizer)
    assert pieces is not None
    for chosen in (texts, texts[::-1], *([text] for text in texts)):
        fresh = pickle.loads(pickle.dumps(pieces))
        found = [ids.tolist() for ids in fresh.encode(tokenizer, chosen)]
        assert found == [plain_ids(tokenizer, text) for text in chosen]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("<>-a ", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    st.lists(st.text("<>-a b", max_size=12), max_size=6),
)
def test_any_added_tokens(tokens: list[str], texts: list[str]) -> None:
    tokenizer = without_added_tokens()
    tokenizer.add_special_tokens(tokens)
    pieces = PieceTokenizer.of(tokenizer)
    assert pieces is not None
    found = [ids.tolist() for ids in pieces.encode(tokenizer, texts)]
    assert found == [plain_ids(tokenizer, text) for text in texts]


def test_a_cut_among_blanks_would_show() -> None:
    """The tests above could fail: cut before every space, texts get other ids."""
    tokenizer, text = KNOWN["llama3"], "a    b"
    cut = [token for part in text.replace(" ", "\0 ").split("\0") for token in plain_ids(tokenizer, part)]
    assert cut != plain_ids(tokenizer, text)


def known_but(**components: Any) -> Tokenizer:
    made = Tokenizer.from_str(KNOWN["llama3"].to_str())
    for name, component in components.items():
        setattr(made, name, component)
    return made


def with_token(token: AddedToken) -> Tokenizer:
    made = known_but()
    made.add_tokens([token])
    return made


def without_added_tokens() -> Tokenizer:
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(alphabet, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def byte_level(**options: bool) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))


FOREIGN: dict[str, Tokenizer] = {
    "sentencepiece-like": families.mistral().backend_tokenizer,
    "prefix space": known_but(pre_tokenizer=byte_level(add_prefix_space=True)),
    "nothing cut": known_but(pre_tokenizer=byte_level(use_regex=False)),
    "no pre-tokenizer": Tokenizer(models.BPE()),
    "cut twice": known_but(pre_tokenizer=pre_tokenizers.Sequence([split_by(PATTERNS["llama3"]), byte_level()])),
    "digits first": known_but(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])),
    "another pattern": known_but(pre_tokenizer=split_by(r"\s+|\S+")),
    "blanks first": known_but(pre_tokenizer=split_by(r"\s+|" + PATTERNS["llama3"])),
    "another behaviour": known_but(pre_tokenizer=split_by(PATTERNS["llama3"], behavior="removed")),
    "lower case": known_but(normalizer=normalizers.Lowercase()),
    "compatibility form": known_but(normalizer=normalizers.NFKC()),
    "dropout": known_but(model=models.BPE({"a": 0}, [], dropout=0.5)),
    "another model": known_but(model=models.WordLevel({"a": 0}, unk_token="a")),
    "token that takes blanks": with_token(AddedToken("<y>", rstrip=True, normalized=False)),
    "token of one word": with_token(AddedToken("y", single_word=True, normalized=False)),
    "token found late": with_token(AddedToken("<y>", normalized=True)),
    "no token": without_added_tokens(),
    "text twice": known_but(post_processor=processors.TemplateProcessing(single="$A $A")),
    "another post-processor": known_but(post_processor=processors.BertProcessing(("<x>", 1), ("<x>", 1))),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_others_are_left_to_the_library(name: str) -> None:
    assert PieceTokenizer.of(FOREIGN[name]) is None


def test_memory_is_bounded_and_not_sent_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_tokenizer, "_MOST_PIECES", 40)
    tokenizer = KNOWN["llama3"]
    pieces = PieceTokenizer.of(tokenizer)
    assert pieces is not None
    for number in range(30):
        text = f"{'long' * 50} <x> {number} {number}a word{number}"
        assert pieces.encode(tokenizer, [text])[0].tolist() == plain_ids(tokenizer, text)
        assert len(pieces._ids) <= 40 and not any(len(piece) > 64 for piece in pieces._ids)
    sent = pickle.dumps(pieces)
    assert b"word" not in sent and len(pickle.loads(sent)._ids) == len(SPECIAL) + 1
    assert pickle.loads(sent).encode(tokenizer, ["a word"])[0].tolist() == plain_ids(tokenizer, "a word")
