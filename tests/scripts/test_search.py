"""The site's search in pages that are opened from the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.campaigns.browser import Browser, chromium

SHIM = Path(__file__).parents[2] / "docs" / "iframe-worker.js"
ASK = """new Promise((resolve, reject) => {
  const worker = new Worker("worker.js");
  worker.addEventListener("message", event => resolve(event.data));
  worker.addEventListener("error", () => reject("refused"));
  worker.postMessage({ query: "subcomponent" });
})"""


@pytest.mark.skipif(chromium() is None, reason="neither chromium nor google-chrome is installed to open the page")
def test_a_worker_of_a_page_on_the_disk_answers(tmp_path):
    shutil.copy(SHIM, tmp_path)
    (tmp_path / "worker.js").write_text(
        'self.addEventListener("message", e => postMessage(e.data.query.toUpperCase()));'
    )
    page = tmp_path / "page.html"
    page.write_text('<body><script src="iframe-worker.js"></script></body>', encoding="utf-8")
    browser = Browser()
    try:
        browser.open(page)
        assert browser.evaluate(ASK) == "SUBCOMPONENT"
        page.write_text("<body></body>", encoding="utf-8")
        browser.open(page)
        with pytest.raises(RuntimeError):  # why it is there
            browser.evaluate(ASK)
    finally:
        browser.close()
