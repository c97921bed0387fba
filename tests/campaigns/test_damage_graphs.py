"""Damaged graphs are right, refused or said."""

from __future__ import annotations

from tests.campaigns.short import check_short


def test_a_damaged_graph_is_right_or_refused_and_a_killed_save_leaves_the_old_or_the_new():
    check_short("damage_graphs")
