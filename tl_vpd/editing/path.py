"""How much each part of a change of weights changes a loss, along the path on which all parts are taken back together.

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

Part = tuple[str, Tensor, Tensor]
"""A site, read directions ``[d_in, k]`` and what is written along them ``[k, d_out]``."""


@torch.enable_grad()
def along_path(
    masked_model: MaskedModel,
    parts: Sequence[Part],
    batches: Sequence[tuple[Tensor, Tensor | None]],
    loss: Callable[[Tensor, int], Tensor],
    *,
    steps: int,
) -> Float[Tensor, " part"]:
    """``a_c`` of every part.

    Args:
        masked_model: of the model with all parts in its weights, on which taps are.
        parts: of the change.
        batches: tokens and their masks; losses of batches are added up.
        loss: of a batch's logits and its number.
        steps: midpoints of s.
    """
    adapter = masked_model.adapter
    total = torch.zeros(len(parts), dtype=adapter.dtype, device=adapter.device)
    reads = [part[1].to(device=adapter.device, dtype=adapter.dtype) for part in parts]
    writes = [part[2].to(device=adapter.device, dtype=adapter.dtype) for part in parts]
    for step in range(steps):
        s = torch.full_like(total, (step + 0.5) / steps).requires_grad_()
        edits: dict[str, SiteEdit] = {}
        for name in dict.fromkeys(part[0] for part in parts):
            at = [i for i, part in enumerate(parts) if part[0] == name]
            scaled = torch.cat([-s[i] * writes[i] for i in at])
            edits[name] = SiteEdit(torch.cat([reads[i] for i in at], dim=1), scaled, (None,) * len(scaled))
        for number, (tokens, token_mask) in enumerate(batches):
            with edited(masked_model, edits):
                value = loss(masked_model.run(tokens, SitePass(), token_mask), number)
                total -= torch.autograd.grad(value, [s], retain_graph=True)[0] / steps
    return total
