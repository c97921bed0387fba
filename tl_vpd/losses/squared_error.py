"""Squared error of outputs, for models whose output is not a distribution.

    MSE(target, masked) = mean_d (t_d − y_d)²          averaged over real positions

Source: SPD (arXiv 2506.20790), section 2, the distance D of models that do not return logits. In float32, or in float64 where
an output is. Without any real position it is 0.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from tl_vpd.losses.precision import at_least_float32


def squared_error(
    target: Float[Tensor, "*batch d"],
    output: Float[Tensor, "*batch d"],
    token_mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error.

    Args:
        target: output of the target model.
        output: output of the masked model.
        token_mask: False at padding, which the mean leaves out (None: no padding).
    """
    error = (at_least_float32(output) - at_least_float32(target)).square().mean(-1)
    if token_mask is None:
        return error.sum() / max(error.numel(), 1)
    return error[token_mask].sum() / token_mask.sum().clamp(min=1)
