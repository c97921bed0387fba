"""Passes in which the output of chosen sites is put in by hand: what a pass under masks computed from another input.

``seen`` collects every site's input and output as the model passes them; ``replaced`` sends every site's through a function.
Both act beside a MaskedModel, whose context has set users' hooks aside and frozen the model.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from tl_vpd.forward import MaskedModel, SiteFunction, SitePass
from tl_vpd.masking import SiteMask


@torch.no_grad()
def replaced(
    masked_model: MaskedModel,
    tokens: Shaped[Tensor, "batch ..."],
    token_mask: Bool[Tensor, "batch pos"] | None,
    function: SiteFunction,
) -> Shaped[Tensor, "batch ..."]:
    """The model's output with every site's output sent through ``function``."""
    return masked_model.run(tokens, SitePass(function), token_mask)


def inputs_and_outputs(
    masked_model: MaskedModel, tokens: Shaped[Tensor, "batch ..."], token_mask: Bool[Tensor, "batch pos"] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every site's input and output in a clean pass, as the model passes them."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        inputs[name], outputs[name] = x, y

    replaced(masked_model, tokens, token_mask, note)
    return inputs, outputs


def masked_product(masked_model: MaskedModel, name: str, x: Tensor, y: Tensor, mask: SiteMask) -> Tensor:
    """A site's output under a mask, from an input and the output that the model computed of it."""
    return masked_model.product(name, x, y).masked(mask)
