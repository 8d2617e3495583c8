"""What the audit of a dataset counts as trouble, and which of it stops ``prepare``. Validation does no I/O."""

from __future__ import annotations

from pydantic import Field

from data_shards.config_model import ConfigModel

Share = float | None


def _share(default: Share, description: str) -> Share:
    return Field(default, ge=0, le=1, description=f"{description} Null: only reported.")


def _count(description: str) -> int | None:
    return Field(None, ge=0, description=f"{description} Null: only reported.")


class AuditConfig(ConfigModel):
    """Limits that make ``prepare`` fail with exit code 2, and how much the audit shows.

    The limits are looked at again each time, also where the data is prepared already; the last five keys count while
    the data is prepared.
    """

    max_dropped_share: Share = _share(0.5, "Records that are dropped: too long, refused, or nothing to train on.")
    max_truncated_share: Share = _share(None, "Records that lose their end or the beginning of their prompt.")
    max_untrained_share: Share = _share(None, "Records in which no token is trained.")
    max_short_share: Share = _share(None, "Records with fewer trained tokens than min_trained_tokens.")
    max_duplicate_share: Share = _share(None, "Records that repeat an earlier one of the same split.")
    max_leak_records: int | None = _count("Records that are in an earlier split too.")
    max_prompt_leak_records: int | None = _count("Records whose prompt is in an earlier split, with another answer.")
    max_conflict_share: Share = _share(None, "Records whose prompt has several answers in the same split.")
    max_special_token_records: int | None = _count("Records whose text holds a special token of the tokenizer.")
    max_unusual_text_share: Share = _share(
        None, "Records with control characters, U+FFFD, broken encoding or invisible characters, each kind by itself."
    )
    max_unknown_token_share: Share = _share(0.05, "Tokens that are the tokenizer's unknown token.")
    min_stop_token_share: Share = _share(None, "Trained answers that end with a stop token.")
    min_trained_share: Share = _share(None, "Trained tokens among all tokens.")
    min_packed_share: Share = _share(None, "Tokens among the places of all packs.")

    min_trained_tokens: int = Field(2, ge=1, description="Fewer trained tokens than this count as a short answer.")
    repeated_answer_share: float = Field(
        0.05, gt=0, le=1, description="An answer given by more than this share of the records is reported."
    )
    num_examples: int = Field(5, ge=1, le=100, description="Examples with file and line kept of each kind and split.")
    num_previews: int = Field(12, ge=0, le=100, description="Records shown token by token on the page.")
    preview_tokens: int = Field(400, ge=16, le=4096, description="Tokens shown of each of them.")
