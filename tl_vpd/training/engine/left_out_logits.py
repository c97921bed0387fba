"""Whether a run's logits are computed inside its losses, a few tokens at a time, instead of by the model for all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tl_vpd.adapters import Unsupported
from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.losses import Unembedding
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.training.config import Precision

LARGE = 1 << 27
"""Bytes of a micro-batch's logits in float32 above which they are computed inside losses, unless an option says otherwise."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.02}
"""How far the model's logits may be from those of its unembedding alone, as a share of their norm."""


def unembedding_for_losses(
    masked_model: MaskedModel,
    tokens: Tensor,
    token_mask: Tensor | None,
    *,
    blocked_logits: bool | None,
    precision: Precision,
) -> Unembedding | None:
    """The unembedding with which losses compute logits; None where the model computes them. Call it under the run's autocast.

    Args:
        masked_model: the target.
        tokens: of the first micro-batch.
        token_mask: False at padding.
        blocked_logits: the option (None: where logits take more than ``LARGE`` bytes and the model can stop before them).
        precision: of the run's products.

    Raises:
        Unsupported: ``blocked_logits`` is True and the model's logits are more than one product.
    """
    unembedding = masked_model.adapter.unembedding()
    size = 0 if unembedding is None else tokens.numel() * unembedding.vocabulary * torch.float32.itemsize
    if not blocked_logits and size <= LARGE:
        return None
    if unembedding is not None:
        unembedding = unembedding.to(torch.bfloat16) if precision == "bfloat16" else unembedding
        row_mask = None if token_mask is None else token_mask[:1]
        if _makes_the_logits(unembedding, masked_model, tokens[:1], row_mask, TOLERANCE[precision]):
            return unembedding
    if blocked_logits:
        raise Unsupported(
            "blocked_logits=True needs a model whose logits are unembed's product and nothing else (no soft cap, no scale, "
            "no hook on them): leave blocked_logits out."
        )
    return None


def _makes_the_logits(
    unembedding: Unembedding, masked_model: MaskedModel, row: Tensor, token_mask: Tensor | None, tolerance: float
) -> bool:
    """Whether the model's logits on a row are that product and nothing else."""
    logits = at_least_float32(masked_model.clean(row, token_mask)[0])
    with masked_model.adapter.unembedding_left_out():
        x = masked_model.clean(row, token_mask)[0]
    if (*x.shape[:-1], unembedding.vocabulary) != logits.shape or x.shape[-1] != unembedding.weight.shape[1]:
        return False
    error = (unembedding.logits(x.flatten(0, -2)) - logits.flatten(0, -2)).norm() / logits.norm()
    return float(error) < tolerance
