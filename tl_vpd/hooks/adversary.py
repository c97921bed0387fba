"""Adversarial masks of a prompt: found by running the model, kept as masks to hand on to ``mask_hooks`` or ``masked``.

    m = g + (1 − g) · r,      r ← clamp(r + step · sign(∇_r KL(target ‖ masked)), 0, 1)

with one source r a subcomponent and Δ, shared over batch and positions (``tl_vpd.masking.fresh``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tl_vpd.divergence import kl_divergence, squared_error
from tl_vpd.hooks.ablations import Subcomponents, indices_by_site
from tl_vpd.hooks.importances import zero_padding
from tl_vpd.hooks.plans import Plan
from tl_vpd.hooks.tapped import TappedModel
from tl_vpd.importance import lower_leaky
from tl_vpd.masking import Masks, fresh_pgd, masks_from_sources
from tl_vpd.site import select

if TYPE_CHECKING:
    from tl_vpd.decomposition import Decomposition


def adversarial_masks(
    decomposition: Decomposition,
    model: nn.Module,
    prompts: Any,
    *,
    kept: Subcomponents | None = None,
    sites: str | Sequence[str] | None = None,
    steps: int = 20,
    step_size: float | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
) -> Masks:
    """The worst masks an adversary finds for these prompts.

    Args:
        prompts: a string, strings, or tokens ``[batch, pos]``.
        kept: subcomponents that may not be ablated at all, all others being free (None: Γ's importances say how far).
        sites: patterns of the sites that are attacked (None: all).
        steps, step_size: of the attack (None: ``2 / steps``). seed: of its start (None: torch's own state).
        attention_mask: 0 at padding (None: found as TransformerLens finds it).

    Raises:
        KeyError, IndexError, ValueError: a site or subcomponent does not exist; the prompts do not fit the model.
    """
    names = select(sites, decomposition.sites)
    indices = None if kept is None else indices_by_site(decomposition, kept)
    packing = decomposition.packing
    with torch.inference_mode(False), TappedModel(decomposition, model) as tapped:
        adapter = tapped.adapter
        tokens = adapter.tokens(prompts)
        keep = adapter.padding(tokens, attention_mask)
        logits, inputs = tapped.clean(tokens, keep)
        with torch.no_grad():
            if indices is None:
                g = zero_padding(lower_leaky(decomposition.pre_sigmoid(inputs, keep)), keep)
            else:
                like = next(iter(inputs.values()))
                g = Plan("adversarial", None, frozenset(names), kept=indices).indicator(
                    like.new_zeros(*like.shape[:-1], packing.total), packing
                )
        target = logits.float().log_softmax(-1) if adapter.return_types else logits.float()
        divergence = kl_divergence if adapter.return_types else squared_error

        def loss(sources: Tensor) -> Tensor:
            masks = masks_from_sources(g, sources, packing).only(names)
            return divergence(target, tapped.masked(tokens, masks, keep, constant_parts=True), keep)

        generator = None if seed is None else torch.Generator(g.device).manual_seed(seed)
        shape = (*[1] * (g.ndim - 1), packing.total + len(packing.names))
        start = torch.rand(*shape, generator=generator, device=g.device).to(g.dtype)
        found = fresh_pgd(loss, start, steps=steps, step_size=step_size)
        return masks_from_sources(g, found.sources, packing).only(names)
