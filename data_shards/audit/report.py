"""The audit as a document (``audit.json``), in print, and against its limits. Described in docs/data-audit.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_shards import signed_json
from data_shards.audit.config import AuditConfig
from data_shards.audit.figures import Figures
from data_shards.audit.findings import (
    Finding,
    Packing,
    Severity,
    by_source,
    by_split,
    findings_of,
    packed_share,
    stop_share,
    total_of,
    trained_share,
)
from data_shards.audit.kind import Kind
from data_shards.audit.part import AuditPart, Example
from data_shards.audit.table import Where
from data_shards.audit.text import visible
from data_shards.errors import DataError

KIND, VERSION = "baton-audit", 1
JSON_NAME, PAGE_NAME = "audit.json", "audit.html"

MAX_LINES = 25
_MAX_SPLITS, _MAX_SOURCES = 4, 5

Report = dict[str, Any]
"""The document's body; every value in it is plain JSON."""


def report_of(audit: AuditPart, packing: Mapping[str, Packing], vocab_size: int) -> Report:
    """``packing`` by split, also of splits that hold nothing."""
    total = total_of(audit)
    splits = by_split(audit)
    return {
        "seq_len": audit.limits.seq_len,
        "total": _figures(total) | {"packed_share": packed_share(packing)},
        "splits": {
            name: _figures(splits.get(name, Figures())) | {"packing": _packing(packing.get(name))}
            for name in dict.fromkeys((*splits, *packing))
        },
        "sources": {name: _figures(figures) for name, figures in by_source(audit).items()},
        "vocabulary": _vocabulary(audit, vocab_size),
        "findings": [_finding(item) for item in findings_of(audit, packing)],
    }


def _figures(figures: Figures) -> Report:
    shares = {"trained_share": trained_share(figures), "stop_token_share": stop_share(figures)}
    return figures.to_json() | shares


def _packing(packing: Packing | None) -> Report | None:
    return packing and {**packing._asdict(), "share": packing.share}


def _vocabulary(audit: AuditPart, size: int) -> Report:
    ids, counts = audit.tokens
    most = np.argsort(-counts, kind="stable")[:10]
    return {
        "size": size,
        "used": len(ids),
        "used_once": int((counts == 1).sum()),
        "most_frequent": [[int(ids[index]), int(counts[index])] for index in most],
    }


def _finding(finding: Finding) -> Report:
    return {
        "kind": finding.kind.value,
        "severity": finding.severity.value,
        "unit": finding.unit,
        "count": finding.count,
        "share": finding.share,
        "splits": dict(finding.splits),
        "meaning": finding.meaning,
        "advice": finding.advice,
        "examples": [_example(item) for item in finding.examples],
    }


def _example(example: Example) -> Report:
    found = _place(example.where) | {"detail": example.detail}
    return found | ({"other": _place(example.other)} if example.other else {})


def _place(where: Where) -> Report:
    return {"path": where.path, "line": where.line, "split": where.split}


def to_bytes(report: Report) -> bytes:
    return signed_json.encode(report, KIND, VERSION)


def from_bytes(data: bytes, where: str) -> Report:
    """Raises CorruptFile where it is cut off, edited, or of a newer version."""
    return signed_json.decode(data, KIND, VERSION, where)


def at(example: Report) -> str:
    """``file:line``, and that of the record that it goes with."""
    here = visible(f"{example['path']}:{example['line']}")
    other = example.get("other")
    return f"{here} = {visible(other['path'])}:{other['line']}" if other else here


def check(report: Report, config: AuditConfig) -> None:
    """Raises DataError, naming each limit that is passed, its value, and where to look."""
    if broken := list(_broken(report, config)):
        raise DataError(
            "the audit of the data stops here:\n"
            + "\n".join(f"  {line}" for line in broken)
            + f"\nMend the data, or set the limit (null: only reported). More stands in {JSON_NAME} and {PAGE_NAME}"
        )


_BY_KIND = {
    "max_truncated_share": (Kind.TRUNCATED,),
    "max_untrained_share": (Kind.TRAINS_ON_NOTHING,),
    "max_short_share": (Kind.SHORT_ANSWER, Kind.ONLY_STOP_TOKEN),
    "max_duplicate_share": (Kind.DUPLICATE,),
    "max_leak_records": (Kind.LEAK,),
    "max_prompt_leak_records": (Kind.PROMPT_LEAK,),
    "max_conflict_share": (Kind.CONFLICT,),
    "max_special_token_records": (Kind.SPECIAL_TOKEN,),
    "max_unusual_text_share": (Kind.CONTROL, Kind.REPLACEMENT, Kind.MOJIBAKE, Kind.INVISIBLE),
}
"""Limits on what single findings count"""


def _broken(report: Report, config: AuditConfig) -> Iterator[str]:
    found = {finding["kind"]: finding for finding in report["findings"]}
    for key, kinds in _BY_KIND.items():
        limit = getattr(config, key)
        for kind in kinds:
            finding = found.get(kind.value)
            if limit is None or finding is None or finding["share" if key.endswith("_share") else "count"] <= limit:
                continue
            first = f", {at(finding['examples'][0])} for one" if finding["examples"] else ""
            yield (
                f"data.audit.{key}={limit:g}: {finding['count']:,} records ({percent(finding['share'])}) "
                f"{finding['meaning']}{first}. {finding['advice']}"
            )
    yield from _broken_totals(report["total"], config)


def _broken_totals(total: Report, config: AuditConfig) -> Iterator[str]:
    dropped = total["dropped_records"] / max(total["records"], 1)
    unknown = total["unknown_tokens"] / max(total["tokens"], 1)
    for key, share, what in (
        ("max_dropped_share", dropped, f"{total['dropped_records']:,} of {total['records']:,} records are dropped"),
        ("max_unknown_token_share", unknown, "of the tokens are the unknown token: the tokenizer does not fit"),
    ):
        limit = getattr(config, key)
        if limit is not None and share > limit:
            yield f"data.audit.{key}={limit:g}: {percent(share)}; {what}"
    for key, share, what in (
        ("min_stop_token_share", total["stop_token_share"], "of the answers end with a stop token"),
        ("min_trained_share", total["trained_share"], "of the tokens are trained"),
        ("min_packed_share", total["packed_share"], "of the packs' places are filled"),
    ):
        limit = getattr(config, key)
        if limit is not None and share < limit:
            yield f"data.audit.{key}={limit:g}: only {percent(share)} {what}"


def percent(share: float) -> str:
    """Never 0% of something, nor 100% where something is missing."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.1%}"


def summary(report: Report) -> str:
    """One line."""
    total, severities = report["total"], [finding["severity"] for finding in report["findings"]]
    counted = [
        f"{number} {severity.value}{'s' if number != 1 else ''}"
        for severity in Severity
        if (number := severities.count(severity.value))
    ]
    return (
        f"{total['records']:,} records, {total['tokens']:,} tokens, {percent(total['trained_share'])} trained: "
        f"{', '.join(counted) or 'no trouble found'}"
    )


def lines(report: Report) -> list[str]:
    """At most ``MAX_LINES``, worst first, aligned, safe for a terminal."""
    shown = [f"data audit: {summary(report)}", *_table("split", report["splits"], _MAX_SPLITS)]
    if len(report["sources"]) > 1:
        shown += _table("source", report["sources"], _MAX_SOURCES)
    findings, room = report["findings"], MAX_LINES - len(shown)
    if len(findings) <= room:
        return shown + [_line(finding) for finding in findings]
    more = f"  … and {len(findings) - room + 1} more kinds in {JSON_NAME} and {PAGE_NAME}"
    return [*shown, *(_line(finding) for finding in findings[: room - 1]), more]


_COLUMNS = ("records", "dropped", "tokens", "trained", "median", "99%", "longest", "stop token", "packed")


def _table(name: str, rows: Report, limit: int) -> list[str]:
    cells = [[name, *_COLUMNS], *([visible(key) or "-", *_cells(row)] for key, row in rows.items())]
    cells = cells if len(cells) <= limit + 1 else [*cells[:limit], [f"… {len(cells) - limit} more", *[""] * 9]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]


def _cells(row: Report) -> list[str]:
    packing = row.get("packing")
    return [
        f"{row['records']:,}",
        f"{row['dropped_records']:,}",
        f"{row['tokens']:,}",
        percent(row["trained_share"]),
        f"{row['length_median']:,}",
        f"{row['length_p99']:,}",
        f"{row['length_longest']:,}",
        percent(row["stop_token_share"]),
        percent(packing["share"]) if packing else "",
    ]


def _line(finding: Report) -> str:
    first = f" ({at(finding['examples'][0])})" if finding["examples"] else ""
    share, count = percent(finding["share"]), f"{finding['count']:,}"
    return f"  {finding['severity']:<8} {finding['kind']:<24} {count:>9} {share:>6}  {finding['meaning']}{first}"
