"""Marks that tests share."""

from __future__ import annotations

import pytest

from tests.matrix.models import has_bridge, kinds_here

needs_bridge = pytest.mark.skipif(
    not has_bridge(), reason="TransformerBridge begins with TransformerLens 3, and an earlier one is installed"
)
needs_hooked_transformer = pytest.mark.skipif(
    "HookedTransformer" not in kinds_here(), reason="TransformerLens 4 has no HookedTransformer, and it is installed"
)
