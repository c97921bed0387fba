"""The page of the bundled files says what the files say."""

from __future__ import annotations

import pytest

from scripts.bundled import page
from scripts.site import tables
from tl_vpd import bundled


def test_the_tables_are_those_of_the_files():
    text = page.PAGE.read_text(encoding="utf-8")
    assert {match[2] for match in tables.BLOCK.finditer(text)} == set(page.TABLES)
    assert tables.filled(text, page.of_report(bundled.evaluation())) == text, "python -m scripts.bundled.page"


def test_a_table_that_is_not_known_is_named():
    with pytest.raises(KeyError, match="weather"):
        tables.filled("<!-- weather -->\n<!-- end -->", page.of_report(bundled.evaluation()))
