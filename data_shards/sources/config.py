"""What can be said about a source of records. Validation does no I/O."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

from pydantic import Field, field_validator, model_validator

from data_shards.config_model import ConfigModel

_LIMITED = re.compile(r"(?s)(.+)#(\d+)")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class RecordFormat(StrEnum):
    """The shape of a source's records."""

    AUTO = "auto"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    INSTRUCTION = "instruction"
    PROMPT_COMPLETION = "prompt_completion"
    COLUMNS = "columns"
    CLASSIFICATION = "classification"
    TEXT = "text"


class ColumnNames(ConfigModel):
    """What a source calls the fields of its format; a field that is not named here has its usual name."""

    messages: str | None = Field(None, description="messages: the list of turns.")
    conversations: str | None = Field(None, description="sharegpt: the list of turns.")
    tools: str | None = Field(None, description="messages, sharegpt, prompt_completion: function schemas.")
    instruction: str | None = Field(None, description="instruction: what is asked.")
    input: str | None = Field(None, description="instruction: follows the instruction.")
    output: str | None = Field(None, description="instruction: the answer.")
    history: str | None = Field(None, description="instruction: earlier [question, answer] pairs.")
    system: str | None = Field(None, description="sharegpt, instruction, columns: the system prompt.")
    prompt: str | None = Field(None, description="columns: the question; prompt_completion: the prompt.")
    completion: str | None = Field(None, description="prompt_completion: the completion.")
    response: str | None = Field(None, description="columns: the answer.")
    text: str | None = Field(None, description="text, classification: the text.")
    label: str | None = Field(None, description="classification: the label.")


USUAL_COLUMNS: dict[RecordFormat, dict[str, str]] = {
    RecordFormat.MESSAGES: {"messages": "messages"},
    RecordFormat.SHAREGPT: {"conversations": "conversations"},
    RecordFormat.INSTRUCTION: {"instruction": "instruction", "output": "output"},
    RecordFormat.PROMPT_COMPLETION: {"prompt": "prompt", "completion": "completion"},
    RecordFormat.COLUMNS: {"prompt": "question", "response": "answer"},
    RecordFormat.CLASSIFICATION: {"text": "text", "label": "label"},
    RecordFormat.TEXT: {"text": "text"},
}
"""Which fields a record of each format must have, and their columns. In the order in which formats are recognised."""

OPTIONAL_COLUMNS: dict[RecordFormat, dict[str, str]] = {
    RecordFormat.MESSAGES: {"tools": "tools"},
    RecordFormat.SHAREGPT: {"system": "system", "tools": "tools"},
    RecordFormat.INSTRUCTION: {"input": "input", "system": "system", "history": "history"},
    RecordFormat.PROMPT_COMPLETION: {"tools": "tools"},
    # No usual name: beside a question, a column called system may be anything.
    RecordFormat.COLUMNS: {"system": ""},
}
"""Which fields it may have besides."""


def known_fields(shape: RecordFormat) -> set[str]:
    return {*USUAL_COLUMNS[shape], *OPTIONAL_COLUMNS.get(shape, ())}


class SourceConfig(ConfigModel):
    """Where records come from, and how they are to be read."""

    path: str = Field(
        min_length=1,
        description="A file, a glob (*, ?, ** for folders at any depth), a folder, s3://… or gs://…, a folder that "
        "datasets' save_to_disk has written, or hf://name of a Hugging Face dataset.",
    )
    name: str = Field("", description="For reports; by default from the path.")
    format: RecordFormat = Field(RecordFormat.AUTO, description="Shape of the records; auto looks at the first.")
    columns: ColumnNames | None = Field(None, description="Column names, where they are not the format's usual ones.")
    chat_template: str | None = Field(None, description="A .jinja file, instead of data.chat_template.")
    weight: float | None = Field(
        None,
        gt=0,
        description="How often its packs come, relative to those of other sources; all of train have one, or none.",
    )
    limit: int | None = Field(None, ge=1, description='Only the first records; short: "file.jsonl#500".')
    hf_config: str | None = Field(None, description="hf://: which configuration of the dataset.")
    hf_split: str | None = Field(None, description="hf:// and saved datasets: which split; default train.")
    label_names: tuple[str, ...] | None = Field(None, description="classification: names of the labels 0, 1, ….")
    prompt_template: str = Field("{text}", description="classification: the prompt, with columns' names in braces.")

    @model_validator(mode="before")
    @classmethod
    def _name_from_path(cls, given: Any) -> Any:
        if isinstance(given, dict) and not given.get("name") and isinstance(given.get("path"), str):
            return {**given, "name": default_name(given["path"])}
        return given

    @field_validator("prompt_template")
    @classmethod
    def _has_placeholder(cls, template: str) -> str:
        if not _PLACEHOLDER.search(template):
            raise ValueError("names no column in braces, such as {text}, so every record would ask the same")
        return template

    @model_validator(mode="after")
    def _columns_fit(self) -> SourceConfig:
        named = set(self.named_columns())
        shapes = list(USUAL_COLUMNS) if self.format == RecordFormat.AUTO else [self.format]
        if named and not any(named <= known_fields(shape) for shape in shapes):
            known = "; ".join(f"{shape.value}: {', '.join(sorted(known_fields(shape)))}" for shape in shapes)
            raise ValueError(f"columns names {', '.join(sorted(named))}; no format has all of them. Known are {known}")
        return self

    def named_columns(self) -> dict[str, str]:
        """Field to column, for those that were named."""
        return {} if self.columns is None else self.columns.model_dump(exclude_none=True)

    def column_of(self, shape: RecordFormat) -> dict[str, str]:
        """Field to column, for all fields that records of this shape must or may have."""
        return {**OPTIONAL_COLUMNS.get(shape, {}), **USUAL_COLUMNS[shape], **self.named_columns()}


def default_name(path: str) -> str:
    """``data/train.jsonl.gz`` → ``train``; ``data/*.jsonl`` → ``data``; ``hf://org/name`` → ``name``."""
    parts = [part for part in re.split(r"/+", path.partition("?")[0] if "://" in path else path) if part]
    plain = [part for part in parts if not re.search(r"[*?\[]", part)]
    return (re.sub(r"(?i)\.[a-z]+(\.(gz|zst))?$", "", plain[-1]) or plain[-1]) if plain else path


def parse_source(text: str) -> SourceConfig:
    """``"file.jsonl#500"``: the path, and how many records of it. A name that ends like that needs the long form."""
    found = _LIMITED.fullmatch(text)
    return SourceConfig(path=found[1], limit=int(found[2])) if found else SourceConfig(path=text)
