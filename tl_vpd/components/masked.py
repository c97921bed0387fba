"""What a site puts out when its subcomponents and Δ are masked.

The masked output (method: VPD, section on masked forwards) is::

    y = ((x @ V) ⊙ m) @ U + m_Δ · (x @ Δ) + b,      Δ = W − V @ U

With ``y₀ = x @ W + b`` of this very pass at hand, that is exactly::

    y = y₀ + (a_h ⊙ m − a · m_Δ) @ U + (m_Δ − 1) · (y₀ − b),      a = x @ V

so that neither Δ nor ``V @ U`` is ever formed, and with every mask at 1 the result is ``y₀`` to the bit. ``a_h`` is ``a`` as
a user's hook left it: patched activations act even where the masks are 1.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def masked_output(
    y: Float[Tensor, "*batch d_out"],
    acts: Float[Tensor, "*batch C"],
    U: Float[Tensor, "C d_out"],
    bias: Float[Tensor, " d_out"] | None,
    *,
    mask: Float[Tensor, "*#batch C"] | None = None,
    delta_mask: Float[Tensor, "*#batch"] | None = None,
    routed: Bool[Tensor, "*#batch"] | None = None,
    patched_acts: Float[Tensor, "*batch C"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """The site's output under masks (None: all ones), from the output ``y`` the model itself computed.

    Args:
        y: ``x @ W + b`` of this pass.
        acts: ``x @ V`` of this pass.
        U: write directions.
        bias: ``b``, which is never masked (None: the site has none).
        mask: one factor a subcomponent.
        delta_mask: the factor of Δ.
        routed: True where the masked path is taken; elsewhere the result is ``y``.
        patched_acts: the activations after users' hooks, if they changed them.
    """
    if patched_acts is None and mask is not None:
        # One elementwise product less than the general form, and the same value.
        coefficients = acts * (mask - (1.0 if delta_mask is None else delta_mask.unsqueeze(-1)))
    else:
        kept = acts if patched_acts is None else patched_acts
        kept = kept if mask is None else kept * mask
        coefficients = kept - (acts if delta_mask is None else acts * delta_mask.unsqueeze(-1))
    change = coefficients @ U
    if delta_mask is not None:
        own = y if bias is None else y - bias
        change = change + (delta_mask.unsqueeze(-1) - 1.0) * own
    if routed is not None:
        change = change * routed.unsqueeze(-1)
    return y + change
