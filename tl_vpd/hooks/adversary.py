"""Adversarial masks of a prompt, by running the model: masks to pass on to ``mask_hooks`` or ``masked``.

    m = g + (1 − g) · r,      r ← clamp(r + step · sign(∇_r KL(target ‖ masked)), 0, 1)

with one source r per subcomponent and Δ, shared over batch and positions (VPD paper, section on evaluation: fresh PGD;
``tl_vpd.masking.fresh``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tl_vpd.forward import MaskedModel
from tl_vpd.forward.target_check import check_decomposition
from tl_vpd.hooks.ablations import Subcomponents, indices_by_site
from tl_vpd.hooks.mask_spec import MaskSpec
from tl_vpd.importance import DecomposedWeights
from tl_vpd.losses import Reconstruction
from tl_vpd.masking import Masks, attacked_masks
from tl_vpd.masking.modes import ModeOptions
from tl_vpd.site import select


def adversarial_masks(
    decomposition: DecomposedWeights,
    model: nn.Module,
    prompts: Any,
    *,
    node_set: Subcomponents | None = None,
    sites: str | Sequence[str] | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Masks:
    """The worst masks that an adversary reaches for these prompts; padding runs unmasked.

    Args:
        decomposition: of this model.
        model: the target; its parameters and hooks are left unchanged.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        node_set: subcomponents that may not be ablated at all, all others being free (None: Γ's importances say how far).
        sites: patterns of the sites that are attacked (None: all).
        attention_mask: 0 at padding (None: the tokens tell, see ``tl_vpd.adapters.prompts``).
        **options: ``steps`` of the attack (20; 1 or more), ``step_size`` (``2 / steps``), and ``seed`` of its start (None:
            torch's global generator).

    Raises:
        KeyError: a site does not exist.
        IndexError: a site has no such subcomponent.
        ValueError: an option is impossible, the prompts do not fit the model, or the model is not the decomposed one.
        TypeError: there is no such option.
    """
    attack = ModeOptions.of("adversarial", options, label="adversarial_masks")
    check_decomposition(decomposition)
    names = select(sites, decomposition.sites)
    indices = None if node_set is None else indices_by_site(decomposition, node_set, name="node_set")
    site_axis = decomposition.site_axis
    with torch.inference_mode(False), MaskedModel(decomposition, model) as masked_model:
        adapter = masked_model.adapter
        tokens = adapter.tokens(prompts)
        token_mask = adapter.padding(tokens, attention_mask)
        logits, inputs = masked_model.clean(tokens, token_mask)
        with torch.no_grad():
            if indices is None:
                g = decomposition.importances(inputs, token_mask)
            else:
                like = next(iter(inputs.values()))
                g = MaskSpec("adversarial", None, frozenset(names), node_set=indices).indicator(
                    like.new_zeros(*like.shape[:-1], site_axis.total), site_axis
                )
        distance = Reconstruction(logits, "kl" if adapter.return_types else "mse", token_mask)

        def at_names(masks: Masks) -> Masks:
            return masks.only(names).at_tokens(token_mask)

        def loss(masks: Masks) -> Tensor:
            return distance(masked_model.masked(tokens, at_names(masks), token_mask, constant_weights=True))

        generator = None if attack.seed is None else torch.Generator(g.device).manual_seed(attack.seed)
        masks = attacked_masks(g, site_axis, loss, steps=attack.steps, step_size=attack.step_size, generator=generator)
        return at_names(masks)
