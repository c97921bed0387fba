"""A model of each class, attached or not; ``tests/tools/models.py`` builds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from tests.tools.models import KINDS, as_masks, decomposition_of, drawn_masks, edit, tokens
from tl_vpd import Decomposition
from tl_vpd.masking import Masks


@dataclass(frozen=True)
class Case:
    """A model, an untrained decomposition of it, constant masks, and the twin whose weights they stand for."""

    kind: str
    model: Any
    vpd: Decomposition
    masks: Masks
    twin: Any
    tokens: Tensor
    other_tokens: Tensor

    def fresh(self) -> Any:
        """The same model with nothing attached to it."""
        return KINDS[self.kind]()


def case_of(kind: str) -> Case:
    """A model of one kind with all that belongs to it."""
    model = KINDS[kind]()
    vpd = decomposition_of(model)
    masks = drawn_masks(vpd)
    return Case(kind, model, vpd, as_masks(masks), edit(KINDS[kind](), vpd, masks), tokens(), tokens(seed=1))


@pytest.fixture(params=list(KINDS))
def case(request: pytest.FixtureRequest) -> Case:
    """One case for every class that the installed TransformerLens has."""
    return case_of(request.param)
