"""The kinds of trouble that an audit tells apart."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    # Records that are not trained on
    UNREADABLE = "unreadable"
    REFUSED = "refused_by_template"
    FILTERED = "filtered_out"
    TRAINS_ON_NOTHING = "trains_on_nothing"
    TOO_LONG = "dropped_too_long"
    # Records that are trained on
    TRUNCATED = "truncated"
    SPLIT = "split"
    ONLY_STOP_TOKEN = "only_stop_token"
    SHORT_ANSWER = "short_answer"
    NO_STOP_TOKEN = "no_stop_token"
    TWO_BOS_TOKENS = "two_bos_tokens"
    UNKNOWN_TOKENS = "unknown_tokens"
    SPECIAL_TOKEN = "special_token_in_text"
    CONTROL = "control_characters"
    REPLACEMENT = "replacement_character"
    MOJIBAKE = "broken_encoding"
    INVISIBLE = "invisible_characters"
    EMPTY_TURN = "empty_turn"
    REPEATED_ROLE = "repeated_role"
    UNANSWERED = "unanswered"
    ECHO = "answer_repeats_prompt"
    OUTLIER = "far_longer_than_the_rest"
    # Records seen beside others
    DUPLICATE = "duplicate"
    REMOVED_DUPLICATE = "removed_duplicate"
    LEAK = "leak"
    PROMPT_LEAK = "prompt_leak"
    CONFLICT = "conflicting_answers"
    REPEATED_ANSWER = "repeated_answer"
    # The dataset as a whole
    EMPTY_SPLIT = "empty_split"
    LOW_TRAINED_SHARE = "low_trained_share"
    LOOSE_PACKS = "loose_packs"


DROPPED = (Kind.UNREADABLE, Kind.REFUSED, Kind.FILTERED, Kind.TRAINS_ON_NOTHING, Kind.TOO_LONG)
