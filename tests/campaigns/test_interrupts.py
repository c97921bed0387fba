"""The short form of the campaign of interrupts."""

from __future__ import annotations

from tests.campaigns.short import check_short


def test_no_interrupt_leaves_anything_behind():
    check_short("interrupts")
