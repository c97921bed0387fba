"""Escaping, and whitespace one can see."""

from __future__ import annotations

import json

import pytest

from tl_vpd.viz.text import escape, for_script, number, spaced, visible

EVIL = "</script><b>&\"'\n\u2028 x"


def test_json_for_a_script_holds_nothing_that_ends_one_and_reads_back():
    text = for_script({"token": EVIL, "n": [1, None]})
    assert not set("<>&\u2028\n") & set(text)
    assert json.loads(text) == {"token": EVIL, "n": [1, None]}
    with pytest.raises(ValueError):
        for_script([float("nan")])


def test_html_is_escaped_in_text_and_attributes():
    assert escape("</b>&\"'") == "&lt;/b&gt;&amp;&quot;&#x27;"


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (" the", "·the"),
        ("   ", "···"),
        ("\n        if", "⏎·×8if"),
        ("\r\n\r\t", "⏎␍⇥"),
        ("\x00é漢", "\\x00é漢"),
        ("\u200b\u2028", "\\u200b\\u2028"),
    ],
)
def test_a_token_on_its_own(token, expected):
    assert visible(token) == expected


def test_a_token_in_its_text_keeps_its_spaces():
    assert spaced(" a\n  b") == "\u00a0a⏎\u00a0\u00a0b"


def test_numbers():
    assert [number(v) for v in (0.12345, -2.0, 1234.5, float("nan"), 0.0)] == ["0.123", "−2", "1,230", "–", "0"]
