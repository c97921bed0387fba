"""The output of a site whose subcomponents and Δ are masked: the definition of every masked forward.

The masked output (VPD paper, section 2) is::

    y = ((x @ V) ⊙ m) @ U + m_Δ · (x @ Δ) + b,      Δ = W − V @ U

With the output ``y₀ = x @ W + b`` that the model has computed in this pass, that is exactly::

    y = b + m_Δ · (y₀ − b) + (a_h ⊙ m − a · m_Δ) @ U,      a = x @ V

so that neither Δ nor ``V @ U`` is ever formed. The first two terms are interpolated (``lerp``), which gives ``y₀`` to the bit at
``m_Δ = 1`` in every dtype, and the product is added in one call. ``a_h`` is ``a`` after users' hooks: patched activations act
even where the masks are 1. ``BlockedMasks`` and ``TraceableMasks`` compute the same in other ways, and are tested against this.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_output(
    y: Float[Tensor, "*batch d_out"],
    acts: Float[Tensor, "*batch C"],
    U: Float[Tensor, "*head C d_out"],
    bias: Float[Tensor, "*head d_out"] | None,
    *,
    mask: Float[Tensor, "*#batch C"] | None = None,
    delta_mask: Float[Tensor, "*#batch"] | None = None,
    routed: Bool[Tensor, "*#batch"] | None = None,
    patched_acts: Float[Tensor, "*batch C"] | None = None,
    overwrite: bool = False,
) -> Float[Tensor, "*batch d_out"]:
    """The site's output under masks (None: all ones), from the output ``y`` the model itself computed.

    Args:
        y: ``x @ W + b`` of this pass.
        acts: ``x @ V`` of this pass.
        U: write directions; with a leading head axis, there is one U for each head of ``acts`` and ``y``.
        bias: ``b``, which is never masked (None: the site has none).
        mask: one factor per subcomponent.
        delta_mask: the factor of Δ.
        routed: True where the masked path is computed; elsewhere the result is ``y``.
        patched_acts: the activations after users' hooks, if they changed them.
        overwrite: whether ``y`` may be overwritten where no gradients are computed, which saves a copy of it.
    """
    scaled = y
    if delta_mask is not None:
        factor = delta_mask.unsqueeze(-1)
        scaled = y * factor if bias is None else torch.lerp(bias.to(y).expand_as(y), y, factor.to(y))
    in_place = not torch.is_grad_enabled() and (scaled is not y or (overwrite and routed is None))
    output = plus_product(scaled, _coefficients(acts, mask, delta_mask, patched_acts), U, in_place=in_place)
    return output if routed is None else torch.where(routed.unsqueeze(-1), output, y)


def _coefficients(acts: Tensor, mask: Tensor | None, delta_mask: Tensor | None, patched_acts: Tensor | None) -> Tensor:
    """``a_h ⊙ m − a · m_Δ``."""
    factor = 1.0 if delta_mask is None else delta_mask.unsqueeze(-1)
    if patched_acts is None and mask is not None:  # one product less than the general form, and the same value
        difference = mask - factor
        if torch.is_grad_enabled() or difference.shape != acts.shape:
            return acts * difference
        return difference.mul_(acts)
    patched = acts if patched_acts is None else patched_acts
    return (patched if mask is None else patched * mask) - acts * factor


def plus_product(y: Tensor, coefficients: Tensor, U: Tensor, *, in_place: bool) -> Tensor:
    """``y + coefficients @ U``; by head where U has a head axis."""
    if U.ndim == 3:
        return y + torch.einsum("...hc,hcd->...hd", coefficients, U)
    rows = y.reshape(-1, y.shape[-1])
    add = rows.addmm_ if in_place else rows.addmm
    return add(coefficients.reshape(-1, U.shape[0]), U).view(y.shape)
