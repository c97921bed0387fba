"""Decompositions and targets in other dtypes than float32."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import GAMMA, some_tokens, tiny_model
from tl_vpd import Unsupported, VPDConfig
from tl_vpd.forward import MaskedModel
from tl_vpd.losses import faithfulness
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


def test_a_target_in_float16_is_refused_with_the_remedy():
    with pytest.raises(Unsupported, match=r"The target is in torch\.float16, .*train on model\.to\(torch\.float32\)"):
        losses(torch.float16, torch.float32)


@pytest.mark.parametrize("kind", ["total", "relative"])
def test_faithfulness_to_a_target_in_bfloat16_is_computed_in_the_precision_of_v_and_u(kind):
    model = tiny_model(dtype=torch.bfloat16)
    config = CONFIG.model_copy(update={"faithfulness": {"kind": kind, "warm_up_steps": 1}})
    vpd = new_decomposition(model, config)
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6))
        loss = trainer.warm_up()
    weights = {name: W.double() for name, W in trainer.weights.items()}
    exact = float(faithfulness(vpd.double().components, weights, relative=kind == "relative").detach())
    assert loss == pytest.approx(exact, rel=1e-6)


def test_a_gradient_of_gamma_that_is_not_finite_stops_the_step_before_an_update():
    model, config = tiny_model(dtype=torch.float32), CONFIG.model_copy(update={"coefficients": {"importance": 1e300}})
    vpd = new_decomposition(model, config)
    before = {name: p.detach().clone() for name, p in vpd.named_parameters()}
    with MaskedModel(vpd, model) as masked_model:
        trainer = Trainer(masked_model, config, (4, 6))
        with pytest.raises(FloatingPointError, match="the gradient of Γ is not finite"):
            trainer.step(some_tokens(shape=(4, 6)))
    assert all(torch.equal(p, before[name]) for name, p in vpd.named_parameters())
