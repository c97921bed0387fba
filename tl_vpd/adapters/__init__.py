"""The only room that knows TransformerLens's classes: where a site's input, output and weight are in a model.

>>> adapter = adapt(model)                     # doctest: +SKIP
>>> adapter.sites["blocks.0.attn.W_Q"]         # doctest: +SKIP
Site(name='blocks.0.attn.W_Q', d_in=96, d_out=96, n_heads=4, d_head=24)
"""

from __future__ import annotations

from torch import nn

from tl_vpd.adapters.hooked_transformer import HookedTransformerAdapter
from tl_vpd.adapters.taps import Unsupported

__all__ = ["HookedTransformerAdapter", "Unsupported", "adapt"]


def adapt(model: nn.Module) -> HookedTransformerAdapter:
    """The adapter for a model.

    Raises:
        TypeError: no adapter knows the model's class.
        Unsupported: the class is known, but a flag or layer type of this model is not.
    """
    from transformer_lens import HookedTransformer

    if isinstance(model, HookedTransformer):
        return HookedTransformerAdapter(model)
    raise TypeError(
        f"A {type(model).__name__} cannot be decomposed. Pass a transformer_lens.HookedTransformer, such as "
        "HookedTransformer.from_pretrained(...)."
    )
