"""A dataset's audit: written beside its manifest, printed, and held against the limits each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce

from data_shards import audit_report
from data_shards.audit import AuditPart, merge
from data_shards.audit_config import AuditConfig
from data_shards.audit_findings import Packing
from data_shards.audit_page import page, previews_of
from data_shards.encode import Encoder
from data_shards.errors import CorruptFile
from data_shards.manifest import SplitEntry
from data_shards.storage import Storage


def write_audit(
    location: Storage, audits: Iterable[AuditPart], splits: dict[str, SplitEntry], seq_len: int, encoder: Encoder
) -> None:
    """Write ``audit.json`` and ``audit.html``. ``audits`` in the order of the dataset's rows."""
    whole = reduce(merge, audits)
    packing = {name: Packing(split.rows, split.tokens, seq_len) for name, split in splits.items()}
    report = audit_report.report_of(whole, packing, len(encoder.tokenizer))
    location.write(audit_report.JSON_NAME, [audit_report.to_bytes(report)])
    location.write(audit_report.PAGE_NAME, [page(report, previews_of(whole.samples, encoder.tokenizer))])


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
