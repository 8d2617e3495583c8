"""A dataset's audit: written beside its manifest, printed, and held against the limits each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce

from data_shards.audit import report as audit_report
from data_shards.audit.config import AuditConfig
from data_shards.audit.findings import Packing
from data_shards.audit.page import page, previews_of
from data_shards.audit.part import AuditPart, merge
from data_shards.audit.table import SpooledTable, Table
from data_shards.encoding.encoder import Encoder
from data_shards.errors import CorruptFile
from data_shards.manifest import SplitEntry
from data_shards.storage import Storage


def write_audit(
    location: Storage, audits: Iterable[AuditPart], splits: dict[str, SplitEntry], seq_len: int, encoder: Encoder
) -> None:
    """Write ``audit.json`` and ``audit.html``. ``audits`` in the order of the dataset's rows."""
    packing = {name: Packing(split.rows, split.tokens, seq_len) for name, split in splits.items()}
    with SpooledTable() as table:
        merged = reduce(merge, (_without_table(audit, table) for audit in audits))
        whole = replace(merged, table=table.whole())
        report = audit_report.report_of(whole, packing, len(encoder.tokenizer))
    location.write(audit_report.JSON_NAME, [audit_report.to_bytes(report)])
    location.write(audit_report.PAGE_NAME, [page(report, previews_of(whole.samples, encoder.tokenizer))])


def _without_table(audit: AuditPart, table: SpooledTable) -> AuditPart:
    table.add(audit.table)
    return replace(audit, table=Table())


def check_audit(location: Storage, config: AuditConfig, report: Callable[[str], None], *, tell: bool) -> None:
    """Hold the dataset's audit against the limits; print it first, if ``tell``.

    Raises DataError where a limit is passed.
    """
    try:
        found = audit_report.from_bytes(location.read(audit_report.JSON_NAME), location.uri_of(audit_report.JSON_NAME))
    except (FileNotFoundError, CorruptFile) as error:
        report(f"data: the audit can't be read ({error}); to have one, delete {location.uri} and prepare again")
        return
    if tell:
        report("\n".join(audit_report.lines(found)))
        report(f"data: more in {location.uri_of(audit_report.PAGE_NAME)}")
    audit_report.check(found, config)
