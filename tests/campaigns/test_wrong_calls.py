"""Wrong calls are refused in one sentence, and right ones are right in every form."""

from __future__ import annotations

from tests.campaigns.calls import coverage, table
from tests.campaigns.calls.world import World
from tests.campaigns.short import check_short


def test_every_wrong_call_is_refused_in_one_sentence():
    check_short("wrong_calls")


def test_every_public_call_and_argument_is_tried(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    world = World()
    lacking = list(coverage.lacking(table.calls(world)))
    world.close()
    assert lacking == []
