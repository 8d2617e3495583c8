"""Which split a record belongs to: by its content alone, so that adding data never moves a record (pure)."""

from __future__ import annotations

TRAIN, VALIDATION, TEST = "train", "validation", "test"


def split_of(position: float, validation_fraction: float) -> str:
    """The split of a record at ``position`` in [0, 1) (``Record.split_position``).

    A larger fraction moves records from training to validation, none the other way.
    """
    return VALIDATION if position < validation_fraction else TRAIN


def fold_of(digest: bytes, folds: int) -> int:
    """The fold in [0, folds) of a record with this digest (``Record.digest``, 16 bytes).

    Equal contents share a fold, so none is trained on and tested at once. The digest's first 8 bytes are scaled to the
    number of folds. They are bits that ``split_position`` (another hash) does not use: a fraction held out beforehand
    takes the same share of each fold.

    Raises ValueError for a digest of another size or fewer than two folds.
    """
    if len(digest) != 16 or folds < 2:
        raise ValueError(f"a fold needs a digest of 16 bytes and at least two folds, not {len(digest)} and {folds}")
    return int.from_bytes(digest[:8], "big") * folds >> 64


def split_of_fold(digest: bytes, folds: int, held_out: int) -> str:
    """The split of a record in the round of a cross-validation that holds out fold ``held_out`` in [0, folds).

    Over all rounds each record is held out just once.
    """
    if not 0 <= held_out < folds:
        raise ValueError(f"fold {held_out} is not one of 0-{folds - 1}")
    return VALIDATION if fold_of(digest, folds) == held_out else TRAIN
