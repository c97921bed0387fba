"""The short form of the campaign."""

from __future__ import annotations

from tests.campaigns.short import check_short


def test_a_damaged_training_is_never_resumed_wrongly():
    check_short("damage_states")
