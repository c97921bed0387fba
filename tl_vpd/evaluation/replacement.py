"""Passes in which a site's output is computed from another input than the one that reaches it.

Both functions run beside a MaskedModel, which has set users' hooks aside and frozen the model.
"""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

from tl_vpd.evaluation.batch import Rows
from tl_vpd.forward import MaskedModel, SiteFunction, SitePass
from tl_vpd.masking import SiteMask


@torch.no_grad()
def replaced(masked_model: MaskedModel, rows: Rows, function: SiteFunction) -> Shaped[Tensor, "row ..."]:
    """The model's output with every site's output replaced by ``function(name, x, y)``."""
    return masked_model.run(rows.tokens, SitePass(function), rows.token_mask)


def inputs_and_outputs(masked_model: MaskedModel, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every site's input and output in a clean pass, as the model passes them."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        inputs[name], outputs[name] = x, y

    replaced(masked_model, rows, note)
    return inputs, outputs


def masked_product(masked_model: MaskedModel, name: str, x: Tensor, y: Tensor, mask: SiteMask) -> Tensor:
    """A site's output under a mask, from an input and the output that the model computed from it."""
    return masked_model.product(name, x, y).masked(mask)
