"""A tiny float32 model, rows of tokens and a short run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import VPDConfig


@pytest.fixture
def target() -> HookedTransformer:
    """The model to decompose."""
    return tiny_model(dtype=torch.float32)


@pytest.fixture
def rows() -> Tensor:
    """Ten rows of six tokens."""
    return some_tokens(shape=(10, 6))


@pytest.fixture
def config() -> VPDConfig:
    """Six steps of four rows after two of warm-up."""
    return VPDConfig(steps=6, batch_size=4, C=5, gamma=GAMMA, faithfulness={"warm_up_steps": 2})
