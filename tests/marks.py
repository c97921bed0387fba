"""Marks that tests share."""

from __future__ import annotations

import pytest

from tests.matrix.models import has_bridge

needs_bridge = pytest.mark.skipif(
    not has_bridge(), reason="TransformerBridge begins with TransformerLens 3, and an earlier one is installed"
)
