"""The campaigns' frame: counting, budgets, and processes that crash."""

from __future__ import annotations

import sys

import pytest

from tests.campaigns import __main__ as command
from tests.campaigns import short
from tests.campaigns.counts import Budget, Counts


def test_counts_add_up_and_survive_json():
    counts = Counts()
    counts.add("right")
    counts.add("silent", "seed 3")
    counts.merge(Counts.from_dict(counts.as_dict()))
    assert (counts.tries, counts.failures) == (4, 2)
    assert counts.examples == {"silent": ["seed 3", "seed 3"]}
    assert counts.summary() == "right 2, silent 2"


def test_a_budget_ends_with_its_tries_or_its_seconds():
    assert list(Budget(3, 60).tries_left()) == [0, 1, 2]
    assert list(Budget(10**9, 0).tries_left()) == [0]


@pytest.mark.parametrize(
    ("body", "seconds", "outcome"),
    [
        ("import os; os.abort()", 60, "crashed"),
        ("while True: pass", 0.5, "hung"),
        ("'nothing is written'", 60, "crashed"),
    ],
)
def test_the_death_of_a_campaign_is_a_failure(body, seconds, outcome, tmp_path):
    counts = short.counts_of([sys.executable, "-c", body], tmp_path / "counts.json", seconds)
    assert counts.outcomes == {outcome: 1}
    assert counts.failures == 1


def test_every_campaign_has_a_test():
    folder = command.ROOT / "tests" / "campaigns"
    for name in short.campaign_names():
        assert (folder / f"test_{name}.py").exists(), name


def test_the_table_is_put_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\nafter\n", encoding="utf-8")
    command.write_table(page, "| new |")
    assert page.read_text(encoding="utf-8") == f"before\n{command.BEGIN}\n\n| new |\n\n{command.END}\nafter\n"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="add both where the table belongs"):
        command.write_table(page, "| new |")
