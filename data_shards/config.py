"""What can be chosen about data. Validation does no I/O."""

from __future__ import annotations

import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigModel(BaseModel):
    """Base of every configuration section: unknown keys are refused, values can't change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class RecordFormat(StrEnum):
    AUTO = "auto"
    MESSAGES = "messages"
    INSTRUCTION = "instruction"
    COLUMNS = "columns"
    TEXT = "text"


class TrainOn(StrEnum):
    ASSISTANT = "assistant"
    ALL = "all"


class TooLong(StrEnum):
    DROP = "drop"
    ERROR = "error"


class ColumnNames(ConfigModel):
    """Names of the two columns of question/answer records."""

    prompt: str = "question"
    response: str = "answer"


class DataConfig(ConfigModel):
    train: str = Field(description="A .jsonl file of records.")
    validation: str | None = Field(None, description="A .jsonl file held out for evaluation.")
    validation_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of train held out, by record hash; instead of a validation file."
    )
    format: RecordFormat = Field(RecordFormat.AUTO, description="Shape of the records; auto looks at the first.")
    columns: ColumnNames | None = Field(None, description="Column names of question/answer records.")
    seq_len: int = Field(2048, ge=8, description="Tokens per pack.")
    train_on: TrainOn = Field(TrainOn.ASSISTANT, description="Which turns are learnt.")
    too_long: TooLong = Field(
        TooLong.DROP, description="A conversation longer than seq_len: drop (counted) or error. Plain text is split."
    )
    require_stop_token: bool = Field(
        True, description="Refuse a template that does not end an assistant turn with a stop token."
    )
    chat_template: str | None = Field(None, description="A .jinja file to use instead of the tokenizer's template.")
    template_date: datetime.date = Field(
        datetime.date(2024, 7, 26), description="The date that templates which print one shall see."
    )
    prepared: str | None = Field(None, description="Where shards go; default <storage>/datasets.")
    max_shard_tokens: int = Field(16_000_000, ge=1, description="Tokens per Arrow shard at most.")

    @model_validator(mode="after")
    def _one_validation(self) -> DataConfig:
        if self.validation is not None and self.validation_fraction:
            raise ValueError("give data.validation or data.validation_fraction, not both")
        if self.columns is not None and self.format not in (RecordFormat.AUTO, RecordFormat.COLUMNS):
            raise ValueError(f"data.columns goes with data.format=columns, not {self.format.value}")
        return self
