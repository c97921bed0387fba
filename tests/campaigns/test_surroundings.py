"""The short form of the campaign of surroundings."""

from __future__ import annotations

from tests.campaigns.short import check_short


def test_calls_give_the_same_where_gradients_are_switched_off():
    check_short("surroundings")
