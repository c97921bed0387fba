"""What a site puts out when its subcomponents and Δ are masked.

The masked output (method: VPD, section on masked forwards) is::

    y = ((x @ V) ⊙ m) @ U + m_Δ · (x @ Δ) + b,      Δ = W − V @ U

With ``y₀ = x @ W + b`` of this very pass at hand, that is exactly::

    y = b + m_Δ · (y₀ − b) + (a_h ⊙ m − a · m_Δ) @ U,      a = x @ V

so that neither Δ nor ``V @ U`` is ever formed. The first two terms are interpolated (``lerp``), which gives ``y₀`` to the bit at
``m_Δ = 1`` in every dtype, and the product is added in one call. ``a_h`` is ``a`` as a user's hook left it: patched activations
act even where the masks are 1.
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
        U: write directions; with a leading head axis, every head of ``acts`` and ``y`` has its own.
        bias: ``b``, which is never masked (None: the site has none).
        mask: one factor a subcomponent.
        delta_mask: the factor of Δ.
        routed: True where the masked path is taken; elsewhere the result is ``y``.
        patched_acts: the activations after users' hooks, if they changed them.
        overwrite: whether ``y`` may be used up where no gradients are wanted, which saves a copy of it.
    """
    own = y
    if delta_mask is not None:
        factor = delta_mask.unsqueeze(-1)
        own = y * factor if bias is None else torch.lerp(bias.to(y).expand_as(y), y, factor.to(y))
    in_place = not torch.is_grad_enabled() and (own is not y or (overwrite and routed is None))
    output = _plus_product(own, _coefficients(acts, mask, delta_mask, patched_acts), U, in_place=in_place)
    return output if routed is None else torch.where(routed.unsqueeze(-1), output, y)


def _coefficients(acts: Tensor, mask: Tensor | None, delta_mask: Tensor | None, patched_acts: Tensor | None) -> Tensor:
    """``a_h ⊙ m − a · m_Δ``."""
    factor = 1.0 if delta_mask is None else delta_mask.unsqueeze(-1)
    if (
        patched_acts is None and mask is not None
    ):  # one elementwise product less than the general form, and the same value
        difference = mask - factor
        if torch.is_grad_enabled() or difference.shape != acts.shape:
            return acts * difference
        return difference.mul_(acts)
    kept = acts if patched_acts is None else patched_acts
    return (kept if mask is None else kept * mask) - acts * factor


def _plus_product(own: Tensor, coefficients: Tensor, U: Tensor, *, in_place: bool) -> Tensor:
    """``own + coefficients @ U``; by head where U has a head axis."""
    if U.ndim == 3:
        return own + torch.einsum("...hc,hcd->...hd", coefficients, U)
    rows = own.reshape(-1, own.shape[-1])
    add = rows.addmm_ if in_place else rows.addmm
    return add(coefficients.reshape(-1, U.shape[0]), U).view(own.shape)
