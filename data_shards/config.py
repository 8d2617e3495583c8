"""What can be chosen about data. Validation does no I/O."""

from __future__ import annotations

import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from data_shards.audit.config import AuditConfig
from data_shards.config_model import ConfigModel
from data_shards.order.permutation import Order
from data_shards.sources.config import ColumnNames, RecordFormat, SourceConfig, parse_source
from data_shards.writing.packing import Packing

__all__ = ["ColumnNames", "ConfigModel", "DataConfig", "RecordFormat", "SourceConfig", "TooLong", "TrainOn"]


class TrainOn(StrEnum):
    ASSISTANT = "assistant"
    LAST = "last"
    ALL = "all"


class TooLong(StrEnum):
    DROP = "drop"
    TRUNCATE = "truncate"
    ERROR = "error"


def _sources(given: Any) -> Any:
    """One source or several, each in the short form or the long one."""
    if given is None:
        return ()
    many = given if isinstance(given, list | tuple) else (given,)
    return tuple(parse_source(one) if isinstance(one, str) else one for one in many)


Sources = Annotated[
    tuple[SourceConfig, ...],
    BeforeValidator(_sources, json_schema_input_type=str | SourceConfig | list[str | SourceConfig] | None),
]


class FoldConfig(ConfigModel):
    """Cross-validation: the records of one fold are held out."""

    folds: int | None = Field(None, ge=2, description="How many parts, by record hash.")
    fold: int = Field(0, ge=0, description="Which of them is held out, from 0.")

    @model_validator(mode="after")
    def _is_one_of_them(self) -> FoldConfig:
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold={self.fold} is not one of {self.folds or 1} (they count from 0)")
        return self


class CleaningConfig(ConfigModel):
    """What is mended or left out before tokenising. Everything left out is counted."""

    strip: bool = Field(False, description="Remove white space around each text.")
    control_characters: bool = Field(
        True, description="Keep control characters other than tab and line ends; false removes them."
    )
    min_tokens: int | None = Field(None, ge=1, description="Leave out records with fewer tokens.")
    max_tokens: int | None = Field(None, ge=1, description="Leave out records with more tokens.")
    deduplicate: bool = Field(False, description="Leave out records that repeat an earlier one of the same split.")


class DataConfig(ConfigModel):
    train: Sources = Field(
        min_length=1,
        description='Where records come from: a path, glob, folder or URI ("file.jsonl#500" for the first 500), a '
        "source with its keys, or a list of those.",
    )
    validation: Sources = Field((), description="Sources held out for evaluation.")
    test: Sources = Field((), description="Sources for baton evaluate --split test; never looked at in training.")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of train held out, by record hash; instead of validation sources."
    )
    split: FoldConfig = FoldConfig()
    format: RecordFormat = Field(
        RecordFormat.AUTO, description="Shape of the records of sources that say none; auto looks at the first."
    )
    columns: ColumnNames | None = Field(None, description="Column names of sources that give none.")
    seq_len: int = Field(2048, ge=8, description="Tokens per pack.")
    packing: Packing = Field(
        Packing.BEST_FIT,
        description="best_fit; one_per_row; sequential (keeps the order); concatenate (plain text only).",
    )
    order: Order = Field(Order.SHUFFLED, description="shuffled, or file: the sources' order, packed sequentially.")
    train_on: TrainOn = Field(TrainOn.ASSISTANT, description="Which turns are learnt.")
    too_long: TooLong = Field(
        TooLong.DROP,
        description="A conversation longer than seq_len: drop, truncate (keeping the answer's start), or error. "
        "Counted and reported. Plain text is split.",
    )
    require_stop_token: bool = Field(
        True, description="Refuse a template that does not end an assistant turn with a stop token."
    )
    chat_template: str | None = Field(None, description="A .jinja file to use instead of the tokenizer's template.")
    template_date: datetime.date = Field(
        datetime.date(2024, 7, 26), description="The date that templates which print one shall see."
    )
    cleaning: CleaningConfig = CleaningConfig()
    audit: AuditConfig = AuditConfig()
    prepared: str | None = Field(None, description="Where shards go; default <storage>/datasets.")
    max_shard_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens packed together, and written as an Arrow shard, at most; default 4 million, or 128 packs "
        "if that is more.",
    )
    processes: int | None = Field(
        None, ge=1, description="Processes that prepare; default one per core, fewer for little data."
    )

    spread: bool | None = Field(
        None,
        description="Prepare by CPU tasks on all nodes of the Ray cluster, a group of files each; default: if there is "
        "one whose nodes all see sources and the storage.",
    )

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataConfig:
        ways = {
            "data.validation": bool(self.validation),
            "data.validation_fraction": bool(self.validation_fraction),
            "data.split.folds": self.split.folds is not None,
        }
        given = [name for name, chosen in ways.items() if chosen]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not {len(given)}")
        return self

    @model_validator(mode="after")
    def _columns_fit(self) -> DataConfig:
        self.sources()  # raises where the defaults do not fit a source
        return self

    def sources(self) -> dict[str, tuple[SourceConfig, ...]]:
        """By role (``train``, ``validation``, ``test``), with this section's format and columns where they say none."""
        return {
            role: tuple(map(self._with_defaults, sources))
            for role, sources in (("train", self.train), ("validation", self.validation), ("test", self.test))
        }

    def _with_defaults(self, source: SourceConfig) -> SourceConfig:
        if source.format != RecordFormat.AUTO or source.columns is not None:
            return source
        return SourceConfig.model_validate(source.model_dump() | {"format": self.format, "columns": self.columns})

    @model_validator(mode="after")
    def _weights_of_all_or_none(self) -> DataConfig:
        names = [source.name for source in self.train]
        if len(set(names)) < len(names):
            raise ValueError(f"data.train has sources of the same name ({', '.join(names)}); give each its own name")
        if len({source.weight is None for source in self.train}) > 1:
            raise ValueError("give every source of data.train a weight, or none")
        if any(source.weight is not None for source in (*self.validation, *self.test)):
            raise ValueError("weights are for data.train; validation and test are read once, as they are")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Of the training sources, by name; empty where they have none."""
        return {source.name: source.weight for source in self.train if source.weight is not None}

    @property
    def shard_tokens(self) -> int:
        """At most so many tokens are packed together and written as one shard.

        Preparing holds them in memory, and a shard is what is fetched from a store at once: no more than it takes for
        the packs to be full.
        """
        return self.max_shard_tokens or max(4_000_000, 128 * self.seq_len)

    @property
    def held_out_share(self) -> float:
        """Of the training sources' records."""
        return 1 / self.split.folds if self.split.folds else self.validation_fraction

    @property
    def holds_out(self) -> bool:
        """Whether there is a validation split."""
        return bool(self.validation or self.validation_fraction or self.split.folds)

    @property
    def packed(self) -> Packing:
        """The file's order is kept only by packing in it."""
        return Packing.SEQUENTIAL if (self.order, self.packing) == (Order.FILE, Packing.BEST_FIT) else self.packing
