"""What subcomponents do on text: where they are important, how often, and their mean inner activation there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_vpd.forward import MaskedModel
from tl_vpd.importance import DecomposedWeights
from tl_vpd.printing import Printed
from tl_vpd.site import Subcomponent


@dataclass(frozen=True, eq=False)
class Activity(Printed):
    """Of several subcomponents on text.

    Attributes:
        subcomponents: which.
        frequency: the fraction of real tokens with an importance above the threshold.
        mean: the mean inner activation ``x @ V[:, c]`` at those (over all real tokens, where there is none).
        tokens: of the text.
        token_mask: False at padding (None: no padding).
        fires: where one of them is important.
        alive: which of all subcomponents are important somewhere in the text.
    """

    subcomponents: tuple[Subcomponent, ...]
    frequency: Float[Tensor, " n"]
    mean: Float[Tensor, " n"]
    tokens: Int[Tensor, "batch pos"] = field(repr=False)
    token_mask: Bool[Tensor, "batch pos"] | None = field(repr=False)
    fires: Bool[Tensor, "batch pos"] = field(repr=False)
    alive: Bool[Tensor, " C_total"] = field(repr=False)

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Tokens that are not padding, on the CPU."""
        return torch.ones_like(self.fires) if self.token_mask is None else self.token_mask.cpu()

    def warn_of_dead(self) -> None:
        """Warns (RuntimeWarning) of those that are not important at any token."""
        dead = [str(c) for c, f in zip(self.subcomponents, self.frequency.tolist(), strict=True) if f == 0]
        if dead:
            more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
            warnings.warn(
                f"{dead[0]}{more} is important at 0 of {int(self.real.sum()):,} tokens (frequency 0): an edit of it changes "
                "next to nothing on such text, and the sign of its activation is that of all tokens.",
                RuntimeWarning,
                stacklevel=4,
            )


@torch.no_grad()
def activity(
    decomposition: DecomposedWeights,
    masked_model: MaskedModel,
    prompts: Any,
    subcomponents: Sequence[Subcomponent],
    *,
    threshold: float = 0.0,
    batch_size: int = 16,
) -> Activity:
    """Runs the model over text and sums what the subcomponents do there.

    Args:
        decomposition: of the model's weights.
        masked_model: that runs.
        prompts: strings, or tokens ``[batch, pos]``; padding is left out.
        subcomponents: which.
        threshold: a subcomponent is important where its importance is above this.
        batch_size: rows that run at once.
    """
    axis, V, chosen = decomposition.site_axis, decomposition.V, tuple(subcomponents)
    columns = [axis.slices[c.site].start + c.index for c in chosen]
    tokens = masked_model.adapter.tokens(prompts)
    token_mask = masked_model.adapter.padding(tokens, None)
    fires, alive, sums = [], torch.zeros(axis.total, dtype=torch.bool), torch.zeros(3, len(chosen), dtype=torch.float64)
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        mask = None if token_mask is None else token_mask[rows]
        _, inputs = masked_model.clean(tokens[rows], mask)
        important = decomposition.importances(inputs, mask) > threshold
        alive |= important.flatten(0, -2).any(0).cpu()
        important = important[..., columns]
        fires.append(important.any(-1).cpu())
        by_site = [inputs[c.site] @ V[c.site][:, c.index].to(inputs[c.site]) for c in chosen]
        acts = torch.stack(by_site, -1).double() if chosen else important.double()
        acts = acts if mask is None else acts * mask.unsqueeze(-1)
        sums += torch.stack([important.double(), important * acts, acts]).flatten(1, -2).sum(1).cpu()
    n = tokens.numel() if token_mask is None else int(token_mask.sum())
    mean = torch.where(sums[0] > 0, sums[1] / sums[0].clamp(min=1), sums[2] / n)
    return Activity(chosen, sums[0] / n, mean, tokens, token_mask, torch.cat(fires), alive)
