"""Passes in which the output of chosen sites is put in by hand: what a pass under masks computed from another input.

``seen`` collects every site's input and output as the model passes them; ``replaced`` sends every site's through a function.
Both act beside a TappedModel, whose context has set users' hooks aside and frozen the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from tl_vpd.hooks.product import Product
from tl_vpd.hooks.tapped import TappedModel
from tl_vpd.masking import SiteMask

Replace = Callable[[str, Tensor, Tensor], Tensor | None]
"""Takes a site's name, its input and its output as the model passes them; gives another output, or None."""


@torch.no_grad()
def replaced(
    tapped: TappedModel, tokens: Shaped[Tensor, "batch ..."], keep: Bool[Tensor, "batch pos"] | None, replace: Replace
) -> Shaped[Tensor, "batch ..."]:
    """The model's output with every site's output sent through ``replace``."""
    inputs: dict[str, Tensor] = {}

    def write(name: str, y: Tensor) -> Tensor | None:
        x = inputs.pop(name, None)  # None: a second HookPoint for the same product, as some versions fire
        return None if x is None else replace(name, x, y)

    with ExitStack() as stack:
        for name in tapped.names:
            for handle in tapped.adapter.tap(name, partial(inputs.__setitem__, name), partial(write, name)):
                stack.callback(handle.remove)
        return tapped.adapter.run(tokens, keep)


def seen(
    tapped: TappedModel, tokens: Shaped[Tensor, "batch ..."], keep: Bool[Tensor, "batch pos"] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every site's input and output in a clean pass, as the model passes them."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        inputs[name], outputs[name] = x, y

    replaced(tapped, tokens, keep, note)
    return inputs, outputs


def masked_product(tapped: TappedModel, name: str, x: Tensor, y: Tensor, mask: SiteMask) -> Tensor:
    """A site's output under a mask, from an input and the output that the model computed of it."""
    product = Product(name, tapped.adapter, tapped.parts, x, y)
    return product.masked(product.acts(), mask)
