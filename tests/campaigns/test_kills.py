"""The short form of the campaign."""

from __future__ import annotations

from tests.campaigns.short import check_short


def test_a_killed_training_resumes_bit_for_bit():
    check_short("kills")
