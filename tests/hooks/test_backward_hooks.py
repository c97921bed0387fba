"""Backward hooks on the HookPoints that W_O and W_out read see the whole gradient, masked path included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny import decomposition_of, draw, some_tokens, tiny_model
from tl_vpd.masking import constant_masks


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_q"])
def test_gradient_at_a_hook_equals_finite_differences(name: str):
    model = tiny_model()
    vpd = decomposition_of(model).to(torch.float64)
    tokens = some_tokens()
    masks = constant_masks(draw(*tokens.shape, vpd.site_axis.total, seed=2), 0.4, vpd.site_axis)
    grads: list[Tensor] = []

    def out(shift: float = 0.0) -> Tensor:
        def push(value: Tensor, hook) -> Tensor:
            moved = value.clone()
            moved[(0, 3, 0, 2) if moved.ndim == 4 else (0, 3, 2)] += shift
            return moved

        return model.run_with_hooks(tokens, fwd_hooks=[(name, push)])[0, 3, 4]

    with vpd.attach(model) as attached, attached.masked(masks):
        with model.hooks(bwd_hooks=[(name, lambda grad, hook: grads.append(grad.clone()))]):
            model(tokens)[0, 3, 4].backward()
        with torch.no_grad():
            numeric = (out(1e-5) - out(-1e-5)) / 2e-5
    assert grads[0][0, 3].flatten()[2] == pytest.approx(float(numeric), rel=1e-6, abs=1e-9)
    assert float(numeric) != 0
