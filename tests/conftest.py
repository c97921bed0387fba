"""Tiny models and decompositions, and the check of every shape in the package while the tests run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from unittest.mock import patch

from jaxtyping import install_import_hook

# What TransformerLens 2.x allows does not know os.PathLike[str], and none knows Unpack before Python 3.11.
if int(version("beartype").split(".")[1]) >= 20 and sys.version_info >= (3, 11):
    install_import_hook("tl_vpd", "beartype.beartype")  # before anything imports the package

import pytest
import torch
from torch import Tensor

from tests.tiny import decomposition_of, some_tokens, tiny_model
from tl_vpd import Decomposition
from tl_vpd.adapters.versions import HookedTransformer
from tl_vpd.training import precision

PROBE = precision.has_bfloat16


@pytest.fixture(autouse=True, scope="session")
def bfloat16_may_be_imitated() -> Iterator[None]:
    """Tiny products in bfloat16 are tested on every processor."""
    with patch.object(precision, "has_bfloat16", return_value=True):
        yield


@pytest.fixture
def probe() -> Callable[..., bool]:
    """The question itself, which the fixture above replaces."""
    return PROBE


@pytest.fixture
def model() -> HookedTransformer:
    """Two layers, LayerNorm, rotary positions, float64, every parameter random."""
    return tiny_model()


@pytest.fixture
def vpd(model: HookedTransformer) -> Decomposition:
    """An untrained decomposition of ``model`` in its dtype: six subcomponents a site, importances spread over [0, 1]."""
    return decomposition_of(model).to(torch.float64)


@pytest.fixture
def tokens() -> Tensor:
    """Two rows of seven tokens."""
    return some_tokens()
