"""The page of an audit in a real browser: nothing that records hold runs, and it fits wide and narrow windows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data_shards.audit.batch import TokenizerFacts
from data_shards.audit.findings import Packing
from data_shards.audit.page import page, previews_of
from data_shards.audit.report import report_of
from tests.support import dirty_data as dirty
from tests.support import tokenizers as families

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path")

POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
MEASURE = """<script>addEventListener("load", () => document.body.setAttribute("data-measured",
[document.documentElement.scrollWidth, innerWidth, document.querySelectorAll("script, img").length, document.title,
getComputedStyle(document.body).backgroundColor].join("|")))
</script></body>"""
"""The widest content, the window, elements that records may have brought, the title (which their script would change),
and the background"""


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the dirty data set, with all records that hold a script among the previews."""
    tokenizer = dirty.tokenizer()
    records, _ = dirty.write(tmp_path_factory.mktemp(dirty.SCRIPT.replace("/", "_")[:60]))
    encoder, facts = dirty.encoder_of(tokenizer), TokenizerFacts.of(tokenizer, families.stop_texts(tokenizer))
    encoded = {split: list(dirty.encode(items, encoder)) for split, items in records.items()}
    audit = dirty.audit_of(encoded, facts, dirty.limits_of(num_previews=100))
    report = report_of(audit, {"train": Packing(100, 20_000, 256)}, facts.vocab_size)
    return page(report, previews_of(audit.samples, tokenizer)).decode()


def browse(path: Path, *options: str) -> str:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        *options,
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def measure(document: str, path: Path, *options: str) -> list[str]:
    """Without the page's policy, which would stop our own script too: escaping alone must hold."""
    without_policy, removed = POLICY.subn("", document)
    assert removed == 1 and "&lt;script" in document
    path.write_text(without_policy.replace("</body>", MEASURE), encoding="utf-8")
    shown = re.search(r'data-measured="([^"]*)"', browse(path, *options, "--dump-dom"))
    assert shown
    return shown[1].split("|")


@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_runs_and_nothing_overflows(width: int, document: str, tmp_path: Path) -> None:
    measured = measure(document, tmp_path / "page.html", f"--window-size={width},1200")
    content, window, foreign, title, *_ = measured
    assert int(content) <= int(window) == width
    assert (foreign, title) == ("1", "Data audit")  # The one script is ours.


@pytest.mark.parametrize(("scheme", "colour"), [("1", "rgb(255, 255, 255)"), ("0", "rgb(20, 24, 31)")])
def test_light_and_dark(scheme: str, colour: str, document: str, tmp_path: Path) -> None:
    shown = measure(document, tmp_path / "page.html", f"--blink-settings=preferredColorScheme={scheme}")
    assert shown[-1] == colour


def test_the_policy_stops_scripts_that_would_get_through(document: str, tmp_path: Path) -> None:
    for text, title in ((document, "Data audit"), (POLICY.sub("", document), "owned")):
        path = tmp_path / "page.html"
        path.write_text(text.replace("</main>", dirty.SCRIPT + "</main>"), encoding="utf-8")
        assert f"<title>{title}</title>" in browse(path, "--dump-dom")
