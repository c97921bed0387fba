"""Inner activations of prompts, and their means: the values of mean- and resample-ablation.

>>> acts = vpd.component_acts(model, tokens)                                          # doctest: +SKIP
>>> vpd.ablation_hooks(["blocks.1.attn.W_Q:3"], values=acts.mean())                   # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_vpd.checks import flag
from tl_vpd.forward import MaskedModel
from tl_vpd.importance import DecomposedWeights
from tl_vpd.losses.precision import at_least_float32
from tl_vpd.printing import Printed
from tl_vpd.site import BySite


@dataclass(frozen=True)
class ComponentActs(BySite, Printed):
    """Activations ``x @ V`` by site, each ``[batch, pos, C]``; ``token_mask`` is False at padding (None: no padding)."""

    by_site: dict[str, Float[Tensor, "batch *pos C"]]
    token_mask: Bool[Tensor, "batch pos"] | None = None

    def mean(self, *, by_position: bool = False) -> dict[str, Float[Tensor, "*pos C"]]:
        """Means over real tokens ``[C]``, or over the batch at each position ``[1, pos, C]``.

        Args:
            by_position: whether each position has its mean.

        Raises:
            TypeError: ``by_position`` is not True or False.
            ValueError: a position is padding in every row, so that it has no mean.
        """
        by_position = flag("by_position", by_position)
        if self.token_mask is None:
            return {
                name: acts.mean(0, keepdim=True) if by_position else acts.flatten(0, -2).mean(0)
                for name, acts in self.by_site.items()
            }
        if not by_position:
            return {name: acts[self.token_mask].mean(0) for name, acts in self.by_site.items()}
        real = self.token_mask.sum(0, keepdim=True)[..., None]
        if bool((real == 0).any()):
            raise ValueError(
                "Some positions are padding in every row, so that they have no mean: pass by_position=False."
            )
        # Sums over many rows are beyond half precision.
        return {
            name: ((at_least_float32(acts) * self.token_mask[..., None]).sum(0, keepdim=True) / real).to(acts)
            for name, acts in self.by_site.items()
        }


@torch.no_grad()
def component_acts(
    decomposition: DecomposedWeights, model: nn.Module, prompts: Any, *, attention_mask: Tensor | None = None
) -> ComponentActs:
    """The inner activations of every subcomponent at every token of the prompts, in the model's dtype on its device.

    Args:
        decomposition: of this model.
        model: the target; its parameters and hooks are left unchanged.
        prompts: a string, strings, or tokens ``[batch, pos]``.
        attention_mask: 0 at padding (None: the tokens tell, see ``tl_vpd.adapters.prompts``).

    Raises:
        ValueError: there are no tokens, too many, or not this model's; or the model is not the decomposed one.
    """
    with MaskedModel(decomposition, model) as masked_model:
        _, token_mask, inputs = masked_model.clean_prompts(prompts, attention_mask)
        return ComponentActs({name: inputs[name] @ V for name, V in masked_model.weights.V.items()}, token_mask)
