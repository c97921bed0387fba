"""How much each of several changes of weights changes a loss, along the path on which all are undone together.

    a_c = ∫₀¹ ⟨∂L/∂W (W' − s Σ_c' P_c'), P_c⟩ ds  ≈  mean over midpoints of s,      Σ_c a_c = L(W') − L(W' − Σ_c P_c)

(integrated gradients, Sundararajan, Taly and Yan, 2017, over weights in the place of inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_vpd.editing.runs import edited
from tl_vpd.forward import MaskedModel, SiteEdit, SitePass

WeightChange = tuple[str, Tensor, Tensor]
"""A site, read directions ``[d_in, k]`` and what is written along them ``[k, d_out]``."""


@torch.enable_grad()
def along_path(
    masked_model: MaskedModel,
    changes: Sequence[WeightChange],
    batches: Sequence[tuple[Tensor, Tensor | None]],
    loss: Callable[[Tensor, int], Tensor],
    *,
    steps: int,
) -> Float[Tensor, " change"]:
    """``a_c`` of every change.

    Args:
        masked_model: of the model with all changes in its weights, on which taps are.
        changes: of weights.
        batches: tokens and their masks; losses of batches are added up.
        loss: of a batch's logits and its number.
        steps: midpoints of s.
    """
    adapter = masked_model.adapter
    total = torch.zeros(len(changes), dtype=adapter.dtype, device=adapter.device)
    reads = [change[1].to(device=adapter.device, dtype=adapter.dtype) for change in changes]
    writes = [change[2].to(device=adapter.device, dtype=adapter.dtype) for change in changes]
    for step in range(steps):
        s = torch.full_like(total, (step + 0.5) / steps).requires_grad_()
        edits: dict[str, SiteEdit] = {}
        for name in dict.fromkeys(change[0] for change in changes):
            at = [i for i, change in enumerate(changes) if change[0] == name]
            scaled = torch.cat([-s[i] * writes[i] for i in at])
            edits[name] = SiteEdit(torch.cat([reads[i] for i in at], dim=1), scaled, (None,) * len(scaled))
        for number, (tokens, token_mask) in enumerate(batches):
            with edited(masked_model, edits):
                value = loss(masked_model.run(tokens, SitePass(), token_mask), number)
                total -= torch.autograd.grad(value, [s], retain_graph=True)[0] / steps
    return total
