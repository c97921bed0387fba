"""Tables as panels."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tl_vpd import viz


def test_numbers_words_and_escaping():
    df = pd.DataFrame({"<name>": ["</td>", "b"], "n": [1234, 5], "x": [0.123456, np.nan], "ok": [True, False]})
    body = viz.table(df, "A & B", note="x < y").body
    assert "<h3>A &amp; B</h3>" in body
    assert "x &lt; y</p>" in body
    assert "<th class=words>&lt;name&gt;</th><th>n</th><th>x</th>" in body
    assert "<td class=words>&lt;/td&gt;</td><td>1,234</td><td>0.123</td><td>True</td>" in body
    assert "<td>5</td><td>–</td><td>False</td>" in body
    assert body.count("<tr>") == 3


def test_a_named_index_is_shown_and_a_plain_one_is_not():
    df = pd.DataFrame({"kl": [0.5]}, index=pd.Index(["rounded"], name="mode"))
    assert "<th class=words>mode</th><th>kl</th>" in viz.table(df, "t").body
    assert "<tr><th>kl</th></tr><tr><td>0.5</td></tr>" in viz.table(df.reset_index(drop=True), "t").body


def test_long_text_may_be_broken_into_lines_and_numbers_never():
    body = viz.table(pd.DataFrame({"a": ["word " * 9, "short"], "x": [1.0, 2.0]}), "t").body
    assert f'<td class="words sentence">{"word " * 9}</td><td>1</td>' in body and "<td class=words>short</td>" in body
