"""Decompositions and targets in other dtypes than float32."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.training import Trainer, new_decomposition

CONFIG = VPDConfig(steps=4, batch_size=4, C=5, gamma=GAMMA, faithfulness={"warm_up_steps": 2})


def losses(target: torch.dtype, dtype: torch.dtype) -> tuple[list[float], torch.dtype]:
    """Total losses of two steps, and the dtype of V afterwards."""
    model = tiny_model(dtype=target)
    vpd = new_decomposition(model, CONFIG).to(dtype)
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, CONFIG, (4, 6))
        trainer.warm_up()
        totals = [trainer.step(some_tokens(seed=i, shape=(4, 6))).total for i in range(2)]
    return totals, next(iter(vpd.V.values())).dtype


@pytest.mark.parametrize("target", [torch.float32, torch.float64])
def test_a_decomposition_in_float64_trains_as_one_in_float32(target):
    expected, _ = losses(target, torch.float32)
    result, dtype = losses(target, torch.float64)
    assert dtype == torch.float64 and result == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decomposition_in_less_than_float32_is_refused_with_the_remedy(dtype):
    with pytest.raises(ValueError, match=rf"V, U and Γ are in {dtype}.*train with decomposition\.float\(\)"):
        losses(torch.float32, dtype)
