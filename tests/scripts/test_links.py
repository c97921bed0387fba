"""Links of pages on the site."""

from __future__ import annotations

from scripts.site.links import on_page_markdown


def test_links_have_titles_and_lead_to_the_sites_copies():
    page = (
        "[training.md](training.md#files), [all](training.md), [a run](../examples/editing.ipynb), [tests](../tests)."
    )
    expected = (
        "[Training a decomposition](training.md#files), [all](training.md), [a run](notebooks/editing.ipynb), tests."
    )
    assert on_page_markdown(page) == expected
