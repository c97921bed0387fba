"""Tables of pages say what the results files say."""

from __future__ import annotations

import pytest

from scripts.site import figures, tables


@pytest.mark.parametrize(("page", "names"), figures.PAGES.items())
def test_the_tables_are_those_of_the_results_files(page, names):
    text = (figures.ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert [match[2] for match in tables.BLOCK.finditer(text)] == list(names)
    assert tables.filled(text, figures.table) == text, "python -m scripts.site.figures"


def test_the_sentence_on_attacks_with_every_subcomponent_is_true():
    circuits = [record for name, record in figures.results("pruning").items() if name != "settings"]
    assert all(circuit[kind]["p_adversarial_everything"] < 1e-6 for circuit in circuits for kind in figures.CIRCUITS)
