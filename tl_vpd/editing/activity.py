"""What subcomponents do on data: how often they are important, and their mean inner activation there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_vpd.checks import integer
from tl_vpd.forward import MaskedModel
from tl_vpd.importance import DecomposedWeights
from tl_vpd.site import Subcomponent

DEAD = 1e-6
"""A subcomponent is called dead on data where it is important at fewer of the tokens than this."""


@dataclass(frozen=True)
class Activity:
    """Of several subcomponents over real tokens.

    Attributes:
        subcomponents: which.
        frequency: the fraction of tokens with an importance above the threshold.
        mean: the mean inner activation ``x @ V[:, c]`` at those (over all tokens, where there is none).
        tokens: how many.
    """

    subcomponents: tuple[Subcomponent, ...]
    frequency: Float[Tensor, " n"]
    mean: Float[Tensor, " n"]
    tokens: int

    def warn_of_dead(self) -> None:
        """Warns (RuntimeWarning) of those that are not important at any token."""
        dead = [str(c) for c, f in zip(self.subcomponents, self.frequency.tolist(), strict=True) if f <= DEAD]
        if dead:
            more = f" (and {len(dead) - 1} more)" if len(dead) > 1 else ""
            warnings.warn(
                f"{dead[0]}{more} is important at 0 of {self.tokens:,} tokens (frequency 0): an edit of it changes "
                "next to nothing on such text, and the sign of its activation is that of all tokens.",
                RuntimeWarning,
                stacklevel=4,
            )


@torch.no_grad()
def activity(
    decomposition: DecomposedWeights,
    model: nn.Module,
    prompts: Any,
    subcomponents: Sequence[Subcomponent],
    *,
    threshold: float = 0.0,
    batch_size: int = 16,
) -> Activity:
    """Runs the model over rows of tokens and sums what the subcomponents do there.

    Args:
        decomposition: of the model's weights.
        model: the target.
        prompts: strings, or tokens ``[batch, pos]``; padding is left out.
        subcomponents: which.
        threshold: a subcomponent is important where its importance is above this.
        batch_size: rows that run at once.
    """
    batch_size, chosen = integer("batch_size", batch_size, minimum=1), tuple(subcomponents)
    axis = decomposition.site_axis
    columns = [axis.slices[c.site].start + c.index for c in chosen]
    with MaskedModel(decomposition, model) as masked_model:
        tokens = masked_model.adapter.tokens(prompts)
        token_mask = masked_model.adapter.padding(tokens, None)
        real = torch.ones(tokens.shape[:2], dtype=torch.bool) if token_mask is None else token_mask.cpu()
        sums = torch.zeros(3, len(chosen), dtype=torch.float64)  # important tokens, activations there, everywhere
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            mask = None if token_mask is None else token_mask[rows]
            _, inputs = masked_model.clean(tokens[rows], mask)
            g = decomposition.importances(inputs, mask)[..., columns].double().cpu()
            V = decomposition.V
            acts = torch.stack([inputs[c.site] @ V[c.site][:, c.index].to(inputs[c.site]) for c in chosen], dim=-1)
            acts = acts.double().cpu() * real[rows].unsqueeze(-1)
            important = (g > threshold).double()
            sums += torch.stack([important, important * acts, acts]).flatten(1, -2).sum(1)
    n = int(real.sum())
    mean = torch.where(sums[0] > 0, sums[1] / sums[0].clamp(min=1), sums[2] / n)
    return Activity(chosen, sums[0] / n, mean, n)
