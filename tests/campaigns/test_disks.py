"""The short form of the campaign."""

from __future__ import annotations

from tests.campaigns.short import check_short


def test_a_full_disk_is_said_and_loses_nothing():
    check_short("disks")
