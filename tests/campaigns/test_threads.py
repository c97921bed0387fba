"""The short form of the campaign of threads."""

from __future__ import annotations

from tests.campaigns.short import check_short


def test_threads_never_get_each_others_results():
    check_short("threads")
