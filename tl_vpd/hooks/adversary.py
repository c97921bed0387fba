"""Adversarial masks of a prompt: found by running the model, kept as masks to hand on to ``mask_hooks`` or ``masked``.

    m = g + (1 − g) · r,      r ← clamp(r + step · sign(∇_r KL(target ‖ masked)), 0, 1)

with one source r a subcomponent and Δ, shared over batch and positions (``tl_vpd.masking.fresh``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tl_vpd.forward.masked_model import MaskedModel
from tl_vpd.hooks.ablations import Subcomponents, indices_by_site
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.hooks.mask_spec import MaskSpec
from tl_vpd.importance import DecomposedWeights, lower_leaky
from tl_vpd.losses import Reconstruction
from tl_vpd.masking import Masks, attacked_masks
from tl_vpd.site import select


def adversarial_masks(
    decomposition: DecomposedWeights,
    model: nn.Module,
    prompts: Any,
    *,
    node_set: Subcomponents | None = None,
    sites: str | Sequence[str] | None = None,
    steps: int = 20,
    step_size: float | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
) -> Masks:
    """The worst masks an adversary finds for these prompts.

    Args:
        prompts: a string, strings, or tokens ``[batch, pos]``.
        node_set: subcomponents that may not be ablated at all, all others being free (None: Γ's importances say how far).
        sites: patterns of the sites that are attacked (None: all).
        steps, step_size: of the attack (None: ``2 / steps``). seed: of its start (None: torch's own state).
        attention_mask: 0 at padding (None: found as TransformerLens finds it).

    Raises:
        KeyError, IndexError, ValueError: a site or subcomponent does not exist; the prompts do not fit the model.
    """
    names = select(sites, decomposition.sites)
    indices = None if node_set is None else indices_by_site(decomposition, node_set)
    site_axis = decomposition.site_axis
    with torch.inference_mode(False), MaskedModel(decomposition, model) as masked_model:
        adapter = masked_model.adapter
        tokens = adapter.tokens(prompts)
        token_mask = adapter.padding(tokens, attention_mask)
        logits, inputs = masked_model.clean(tokens, token_mask)
        with torch.no_grad():
            if indices is None:
                g = zero_padding(lower_leaky(decomposition.pre_sigmoid(inputs, token_mask)), token_mask)
            else:
                like = next(iter(inputs.values()))
                g = MaskSpec("adversarial", None, frozenset(names), node_set=indices).indicator(
                    like.new_zeros(*like.shape[:-1], site_axis.total), site_axis
                )
        distance = Reconstruction(logits, "kl" if adapter.return_types else "mse", token_mask)

        def loss(masks: Masks) -> Tensor:
            return distance(masked_model.masked(tokens, masks.only(names), token_mask, constant_weights=True))

        generator = None if seed is None else torch.Generator(g.device).manual_seed(seed)
        masks = attacked_masks(g, site_axis, loss, steps=steps, step_size=step_size, generator=generator)
        return masks.only(names)
