"""No text in a picture or a page becomes code: the markup always, Chromium where it is installed."""

from __future__ import annotations

import pytest

from tests.campaigns.browser import Browser, chromium
from tests.campaigns.counts import Counts
from tests.campaigns.injection import HARMLESS, PAYLOADS, RUN, Places, judge, skeleton, written
from tests.campaigns.short import check_short
from tl_vpd.viz.panel import Panel


@pytest.fixture(scope="module")
def places() -> Places:
    return Places()


@pytest.mark.parametrize("text", [p for i, p in enumerate(PAYLOADS) if i % 7 == 0], ids=repr)
def test_a_page_has_the_elements_and_attributes_of_its_template(places: Places, text: str, tmp_path):
    one, other = (skeleton(written(places, t, tmp_path / "page.html")) for t in (text, HARMLESS))
    assert one == other


def test_the_campaign_notices_what_gets_through(tmp_path):
    text, path, counts = f"<img src=x onerror={RUN}>", tmp_path / "page.html", Counts()
    panel, other = Panel(title="t", body=f"<p>{text}</p>"), Panel(title="t", body="<p>x</p>")
    assert skeleton(panel.save(path).read_text("utf-8")) != skeleton(other.save(path).read_text("utf-8"))
    if chromium() is None:
        pytest.skip("neither chromium nor google-chrome is installed to open the pages")
    browser = Browser()
    try:
        path.write_text(panel.html, encoding="utf-8")
        judge(browser, path, text, [(panel, True)], counts, "notebook")
        assert all(what in counts.examples["silent"][0] for what in ("ran: [1]", "bad: ", "fetched"))
        panel.save(path)  # the policy lets nothing run, and that it had to is noticed
        judge(browser, path, text, [(panel, True)], counts, "page")
        assert "ran" not in counts.examples["silent"][1].partition(": [")[2].replace(RUN, "")
        assert "refused: " in counts.examples["silent"][1]
    finally:
        browser.close()


def test_nothing_runs_in_a_browser_and_every_text_is_shown():
    if chromium() is None:
        pytest.skip("neither chromium nor google-chrome is installed to open the pages")
    check_short("injection")
