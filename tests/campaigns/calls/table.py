"""Every public call with right arguments."""

from __future__ import annotations

from tests.campaigns.calls import (
    analysis,
    attention,
    clustering,
    configs,
    evaluation,
    harvests,
    hooks,
    labels,
    nulls,
    pictures,
    targeted,
    training,
    transcoders,
)
from tests.campaigns.calls.world import Call, World

ROOMS = (
    hooks,
    analysis,
    harvests,
    clustering,
    attention,
    evaluation,
    nulls,
    labels,
    pictures,
    training,
    targeted,
    transcoders,
    configs,
)


def calls(w: World) -> list[Call]:
    """The whole table."""
    return [call for room in ROOMS for call in room.calls(w)]
